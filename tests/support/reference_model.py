"""YOCO written down a second time: float64, one process, an equation per line, nothing shared with the project's model.

Source: arXiv 2405.05254 sections 2 and 3, and the authors' code where the paper is silent (embedding scale, key scale,
tau, RoPE frequencies, a norm of its own for K,V). Matrices multiply from the right: y = x W^T with W [out, in].

Of several sets of K,V (`kv_sets`) each is read by an equal group of neighbouring layers; `kv_sources` says behind how
many layers they are projected, equally many each.

Gated memory units (`cross_pattern`, a G): arXiv 2507.06607, y = (m * silu(x W1)) W2 with m what the last recurrent
layer of the self-decoder reads from its state, before its own gate: normalised where its norm comes before the gate.

Legend: B batch, T tokens, d hidden, H query heads, G K,V heads, D head width. Rotary angles, their sines and cosines
are fp32 as in the authors' code, everything else is float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_megatron.mixers import mixer_of_layer

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """All that the weights do not say."""

    num_layers: int
    num_self_decoder_layers: int
    self_decoder: str
    self_heads: int
    self_groups: int
    heads: int
    groups: int
    window: int
    tau: float = 16.0
    theta: float = 10000.0
    rope: str = "yoco"
    interleaved: bool = True
    scale_embedding: bool = True
    eps: float = 1e-5
    kv_sets: int = 1
    kv_sources: tuple[int, ...] = ()
    cross_pattern: str = ""

    @property
    def source_of_set(self) -> list[int]:
        sources = self.kv_sources or (self.num_self_decoder_layers,)
        return [source for source in sources for _ in range(self.kv_sets // len(sources))]


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def frequencies(width: int, sizes: Sizes) -> Tensor:
    """yoco: theta^-e with the exponents e from 0 to exactly 1. standard: theta^(-2j / width)."""
    pairs = width // 2
    exponents = [j / (pairs - 1) if sizes.rope == "yoco" else 2 * j / width for j in range(pairs)]
    return torch.tensor([sizes.theta**-e for e in exponents], dtype=torch.float32)


def rope(x_BTHD: Tensor, sizes: Sizes) -> Tensor:
    """Rotate pairs (2j, 2j + 1), or (j, j + D/2) when not interleaved, by position * frequency_j."""
    T, D = x_BTHD.shape[1], x_BTHD.shape[-1]
    angle_T1F = (torch.arange(T, dtype=torch.float32)[:, None] * frequencies(D, sizes))[:, None]
    cos, sin = angle_T1F.cos().double(), angle_T1F.sin().double()
    if sizes.interleaved:
        a, b = x_BTHD[..., 0::2], x_BTHD[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x_BTHD[..., : D // 2], x_BTHD[..., D // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def heads(x_BTN: Tensor, number: int) -> Tensor:
    return x_BTN.unflatten(-1, (number, -1))


def attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int | None) -> Tensor:
    """Query i attends to keys i - window < j <= i; query head h reads K,V head floor(h G / H). Returns [B, T, H D]."""
    T, H, D = q_BTHD.shape[1:]
    of_head = [h * k_BTGD.shape[2] // H for h in range(H)]
    scores = torch.einsum("bihd,bjhd->bhij", q_BTHD, k_BTGD[:, :, of_head]) / D**0.5
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    visible = (j <= i) & (i - j < (window or T))
    probabilities = torch.where(visible, scores, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v_BTGD[:, :, of_head]).flatten(2)


def retention(x: Tensor, w: Weights, name: str, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(output, memory): S_t = gamma_t S_{t-1} + k_t^T v_t, o_t = q_t S_t; gamma_t = sigmoid(x_t w)^(1/tau)."""
    H = sizes.self_heads
    q, k, v = (heads(x @ w[f"{name}.{m}"].T, H) for m in "qkv")
    q, k = rope(q, sizes), rope(k, sizes) / q.shape[-1] ** 0.5
    gamma_BTH = torch.sigmoid(x @ w[f"{name}.decay"].T) ** (1 / sizes.tau)
    S_BHDD, o = 0.0, []
    for t in range(x.shape[1]):
        S_BHDD = gamma_BTH[:, t, :, None, None] * S_BHDD + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(torch.einsum("bhd,bhde->bhe", q[:, t], S_BHDD))
    y = rms(torch.stack(o, dim=1), sizes.eps).flatten(2)
    return (silu(x @ w[f"{name}.gate"].T) * y) @ w[f"{name}.out"].T, y


def projected(x: Tensor, w: Weights, name: str, number: int, sizes: Sizes) -> Tensor:
    """Queries, keys or values of so many heads: with a bias and a norm over each head's width where `w` has them."""
    y = heads(x @ w[name].T + w.get(f"{name}.bias", 0.0), number)
    return rms(y, sizes.eps) * w[f"{name}.norm"] if f"{name}.norm" in w else y


def window_attention(x: Tensor, w: Weights, name: str, sizes: Sizes) -> tuple[Tensor, None]:
    q = projected(x, w, f"{name}.q", sizes.self_heads, sizes)
    k, v = (projected(x, w, f"{name}.{m}", sizes.self_groups, sizes) for m in "kv")
    return attention(rope(q, sizes), rope(k, sizes), v, sizes.window) @ w[f"{name}.out"].T, None


def gated_delta_net(x: Tensor, w: Weights, name: str, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(output, memory): S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t / sqrt(D) (2412.06464)."""
    q, k, v = (heads(short_convolution(x @ w[f"{name}.{m}"].T, w[f"{name}.{m}_conv"]), sizes.self_heads) for m in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    b_BTH = torch.sigmoid(x @ w[f"{name}.beta"].T)
    a_BTH = torch.exp(-w[f"{name}.A_log"].exp() * torch.log1p(torch.exp(x @ w[f"{name}.decay"].T + w[f"{name}.dt"])))
    S_BHDD, o = torch.zeros(*q.shape[:1], *q.shape[2:], q.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        erased = torch.einsum("bhk,bhl,bhlv->bhkv", k[:, t], k[:, t], S_BHDD)
        written = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        a, b = a_BTH[:, t, :, None, None], b_BTH[:, t, :, None, None]
        S_BHDD = a * (S_BHDD - b * erased) + b * written
        o.append(torch.einsum("bhd,bhde->bhe", q[:, t], S_BHDD) / q.shape[-1] ** 0.5)
    y = (rms(torch.stack(o, dim=1), sizes.eps) * w[f"{name}.o_norm"]).flatten(2)
    return (y * silu(x @ w[f"{name}.gate"].T)) @ w[f"{name}.out"].T, y


def short_convolution(x_BTC: Tensor, w_CW: Tensor) -> Tensor:
    """silu of each channel's causal convolution; the last tap is the token's own."""
    T, W = x_BTC.shape[1], w_CW.shape[1]
    padded = torch.nn.functional.pad(x_BTC, (0, 0, W - 1, 0))
    return silu(sum(padded[:, j : j + T] * w_CW[:, j] for j in range(W)))


MIXERS = {"gated_delta_net": gated_delta_net, "gated_retention": retention, "sliding_window": window_attention}


def ffn(x: Tensor, w: Weights, name: str) -> Tensor:
    return (silu(x @ w[f"{name}.a"].T) * (x @ w[f"{name}.b"].T)) @ w[f"{name}.c"].T


def logits(w: Weights, tokens_BT: Tensor, sizes: Sizes) -> Tensor:
    """Logits [B, T, vocabulary] of the whole model. A head that is not in `w` is tied to the embedding."""
    return from_embeddings(w, w["embedding"][tokens_BT], sizes)


def mtp_logits(w: Weights, tokens_BT: Tensor, labels_BT: Tensor, sizes: Sizes, layers: int) -> list[Tensor]:
    """Of the first, second, ... token after `labels_BT`, by layers on the last K,V; weights named mtp0.*, mtp1.*, ...

    The last positions, one for each layer, read tokens that are not theirs.
    """
    x, kv = states(w, w["embedding"][tokens_BT], sizes)
    scale = x.shape[-1] ** 0.5 if sizes.scale_embedding else 1.0
    found = []
    for depth in range(layers):
        name = f"mtp{depth}"
        of_next = rms(w["embedding"][labels_BT.roll(-depth, 1)] * scale, sizes.eps) * w[f"{name}.embedding_norm"]
        x = torch.cat((rms(x, sizes.eps) * w[f"{name}.hidden_norm"], of_next), dim=-1) @ w[f"{name}.projection"].T
        x = cross_layer(x, w, name, *kv, sizes)
        found.append(head(x, w, sizes))
    return found


def from_embeddings(w: Weights, embedded_BTd: Tensor, sizes: Sizes) -> Tensor:
    return head(states(w, embedded_BTd, sizes)[0], w, sizes)


def head(x: Tensor, w: Weights, sizes: Sizes) -> Tensor:
    return (rms(x, sizes.eps) * w["final_norm"]) @ w.get("head", w["embedding"]).T


def memory_unit(x: Tensor, w: Weights, layer: str, memory: Tensor, sizes: Sizes) -> Tensor:
    normed = rms(x, sizes.eps) * w[f"{layer}.norm"]
    x = x + (memory * silu(normed @ w[f"{layer}.gate"].T)) @ w[f"{layer}.out"].T
    return x + ffn(rms(x, sizes.eps) * w[f"{layer}.ffn_norm"], w, layer)


def cross_layer(x: Tensor, w: Weights, layer: str, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    q = rope(projected(rms(x, sizes.eps) * w[f"{layer}.norm"], w, f"{layer}.q", sizes.heads, sizes), sizes)
    x = x + attention(q, k, v, window=None) @ w[f"{layer}.out"].T
    return x + ffn(rms(x, sizes.eps) * w[f"{layer}.ffn_norm"], w, layer)


def states(w: Weights, embedded_BTd: Tensor, sizes: Sizes) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states before the final norm, and the last K,V."""
    x = embedded_BTd * (embedded_BTd.shape[-1] ** 0.5 if sizes.scale_embedding else 1.0)
    behind, memory = {0: x}, None
    for layer in range(sizes.num_self_decoder_layers):
        mixer = MIXERS[mixer_of_layer(sizes.self_decoder, layer).name]
        mixed, of_layer = mixer(rms(x, sizes.eps) * w[f"{layer}.norm"], w, f"{layer}", sizes)
        x, memory = x + mixed, memory if of_layer is None else of_layer
        x = x + ffn(rms(x, sizes.eps) * w[f"{layer}.ffn_norm"], w, f"{layer}")
        behind[layer + 1] = x
    readers = (sizes.num_layers - sizes.num_self_decoder_layers) // sizes.kv_sets
    for layer in range(sizes.num_self_decoder_layers, sizes.num_layers):
        if sizes.cross_pattern[layer - sizes.num_self_decoder_layers :][:1] == "G":
            x = memory_unit(x, w, f"{layer}", memory, sizes)
            continue
        of = (layer - sizes.num_self_decoder_layers) // readers
        source = sizes.source_of_set[of]
        normed = rms(behind[source], sizes.eps) * w[f"kv.{of}.norm"]
        k, v = (projected(normed, w, f"kv.{of}.{m}", sizes.groups, sizes) for m in "kv")
        k = rope(k, sizes)
        x = cross_layer(x, w, f"{layer}", k, v, sizes)
    return x, (k, v)


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[label]."""
    chosen = logits_BTV.gather(-1, labels_BT[..., None]).squeeze(-1)
    return (logits_BTV.logsumexp(-1) - chosen).mean()


def weights_from_yoco(state: Weights, sizes: Sizes) -> dict[str, Tensor]:
    """The project's parameters (names of a single process) as this file's, by views: gradients flow back through them.

    What a fused matrix holds, in rows: qkvg per head [q, k, v, gate]; qkv per K,V head [its queries, k, v]; kv per head
    [k, v] of each set; fc1 [a; b].
    """

    def split(matrix: Tensor, groups: int, parts: list[int]) -> list[Tensor]:
        """Rows of every group cut into parts of so many heads each."""
        of_group = matrix.unflatten(0, (groups, sum(parts), -1))
        return [part.flatten(0, 2) for part in of_group.split(parts, dim=1)]

    def attention_weights(fused: str, names: list[str], groups: int, parts: list[int]) -> Weights:
        """Matrices by their names, and their biases, which some models have."""
        found = dict(zip(names, split(state[f"{fused}.weight"], groups, parts)))
        if (bias := state.get(f"{fused}.bias")) is not None:
            of_matrices = split(bias[:, None], groups, parts)
            found |= {f"{name}.bias": part[:, 0] for name, part in zip(names, of_matrices)}
        return found

    def norm_weight(module: str, name: str) -> Weights:
        """That of queries or keys, which some models have."""
        weight = state.get(f"{module}.weight")
        return {} if weight is None else {f"{name}.norm": weight}

    w = {"embedding": state["embedding.word_embeddings.weight"], "final_norm": state["final_layernorm.weight"]}
    if "output_layer.weight" in state:
        w["head"] = state["output_layer.weight"]
    for source in dict.fromkeys(sizes.source_of_set):
        sets = [of for of in range(sizes.kv_sets) if sizes.source_of_set[of] == source]
        module = f"decoder.shared_kv{f'_{source}' if source != sizes.source_of_set[-1] else ''}"
        w |= {f"kv.{of}.norm": state[f"{module}.layernorm.weight"] for of in sets}
        names = [f"kv.{of}.{m}" for of in sets for m in "kv"]
        w |= attention_weights(f"{module}.linear_kv", names, sizes.groups, [1, 1] * len(sets))
        for number, of in enumerate(sets):
            w |= norm_weight(f"{module}.k_layernorm.{number}", f"kv.{of}.k")
    places = {str(layer): f"decoder.layers.{layer}." for layer in range(sizes.num_layers)}
    for depth in range(sum(name.endswith(".projection.weight") for name in state)):
        places[f"mtp{depth}"] = f"mtp_{depth}.block.layers.{sizes.num_layers + depth}."
        names = ("hidden_norm", "embedding_norm", "projection")
        w |= {f"mtp{depth}.{name}": state[f"mtp_{depth}.{name}.weight"] for name in names}
    for layer, ours in places.items():
        of_self_decoder = layer.isdigit() and int(layer) < sizes.num_self_decoder_layers
        kind = mixer_of_layer(sizes.self_decoder, int(layer)) if of_self_decoder else None
        mixer = f"{ours}{kind.init_name if kind else 'self_attention'}."
        w[f"{layer}.norm"] = state[f"{ours}input_layernorm.weight"]
        w[f"{layer}.ffn_norm"] = state[f"{ours}pre_mlp_layernorm.weight"]
        w[f"{layer}.a"], w[f"{layer}.b"] = state[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        w[f"{layer}.c"] = state[f"{ours}mlp.linear_fc2.weight"]
        w[f"{layer}.out"] = state[f"{mixer}linear_proj.weight"]
        if f"{mixer}linear_gate.weight" in state:
            matrices = {"gate": state[f"{mixer}linear_gate.weight"]}
        elif kind is None:
            matrices = {}
            w |= attention_weights(f"{mixer}linear_q", [f"{layer}.q"], 1, [1])
            w |= norm_weight(f"{mixer}q_layernorm", f"{layer}.q")
        elif kind.name == "gated_retention":
            parts = split(state[f"{mixer}linear_qkvg.weight"], sizes.self_heads, [1, 1, 1, 1])
            matrices = dict(zip(("q", "k", "v", "gate"), parts)) | {"decay": state[f"{mixer}linear_decay.weight"]}
        elif kind.name == "gated_delta_net":
            parts = split(state[f"{mixer}linear_qkvg.weight"], sizes.self_heads, [1, 1, 1, 1])
            matrices = dict(zip(("q", "k", "v", "gate"), parts))
            matrices |= zip(("beta", "decay"), split(state[f"{mixer}linear_ba.weight"], sizes.self_heads, [1, 1]))
            convolutions = split(state[f"{mixer}conv.weight"].flatten(1), sizes.self_heads, [1, 1, 1])
            matrices |= zip(("q_conv", "k_conv", "v_conv"), convolutions)
            of_heads = {"A_log": "A_log", "dt": "dt_bias", "o_norm": "norm.weight"}
            matrices |= {name: state[f"{mixer}{theirs}"] for name, theirs in of_heads.items()}
        else:
            assert kind.name == "sliding_window", "write the reference of this mixer here"
            queries = sizes.self_heads // sizes.self_groups
            matrices = {}
            names = [f"{layer}.{m}" for m in "qkv"]
            w |= attention_weights(f"{mixer}linear_qkv", names, sizes.self_groups, [queries, 1, 1])
            for m in "qk":
                w |= norm_weight(f"{mixer}{m}_layernorm", f"{layer}.{m}")
        w |= {f"{layer}.{name}": matrix for name, matrix in matrices.items()}
    return w
