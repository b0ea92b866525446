"""Which tensors a YOCO has, and what each format calls them.

The names of the Hugging Face export are the canonical names: one unfused matrix per name, rows ordered by head.
Megatron fuses matrices that read the same input, rows grouped by head so that tensor parallelism cuts between heads;
fla and the authors' code rename only.
"""

from typing import Any

import torch
from torch import Tensor

from yoco_megatron.config.memory_units import is_memory_unit
from yoco_megatron.convert.config_fields import sizes
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import SLIDING_WINDOW, Mixer, mixer_of_layer, mixers_in
from yoco_megatron.mixers.record import FusedMatrix, Shape

MULTI_TOKEN = "model.mtp_layers."
"""Prefix of the layers of multi-token prediction, which the model's logits do not depend on."""
ALWAYS_FP32 = "e_score_correction_bias"
"""End of the name of what no cast of a model touches."""


def shapes(config: Any) -> dict[str, Shape]:
    """Every tensor of the model that a YocoConfig describes, in the order of the forward pass; [out, in] for matrices.

    A tied head is the embedding, and has no entry.
    """
    h, ffn, split_layer = config.hidden_size, config.intermediate_size, config.num_self_decoder_layers
    q, kv = config.num_attention_heads * config.head_dim, _kv_heads_of_source(config) * config.head_dim
    cross_tensors = _of_attention(config, {"q_proj": (q, h), "o_proj": (h, q)}, {"q_norm": config.head_dim})
    found: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for index in range(config.num_hidden_layers + config.mtp_num_layers):
        if kv_name := config.kv_names.get(index):
            norms = {f"k_norm.{number}": config.head_dim for number in range(_sets_of_source(config))}
            of_kv = {"norm.weight": (h,)} | _of_attention(config, {"k_proj": (kv, h), "v_proj": (kv, h)}, norms)
            found |= {f"model.{kv_name}.{name}": shape for name, shape in of_kv.items()}
        layer: dict[str, Shape] = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        tensors = cross_tensors
        if is_memory_unit(config, index):
            memory = config.memory_width
            tensors = {"in_proj.weight": (memory, h), "out_proj.weight": (h, memory)}
        elif index < split_layer:
            tensors = _of_mixer(config, mixer_of_layer(config.self_decoder, index))
        layer |= {f"mixer.{name}": shape for name, shape in tensors.items()}
        layer |= _of_experts(config) if config.layers_with_experts[index] else _of_mlp("mlp.", h, ffn)
        if index >= config.num_hidden_layers:
            layer |= {"hidden_norm.weight": (h,), "embedding_norm.weight": (h,), "proj.weight": (h, 2 * h)}
        found |= {f"{layer_name(config, index)}{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (h,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, h)
    return found


def _of_mixer(config: Any, mixer: Mixer) -> dict[str, Shape]:
    """All tensors of a mixer of the self-decoder."""
    matrices = mixer.tensors(sizes(config))
    if mixer.is_softmax_attention:
        return _of_attention(config, matrices, dict.fromkeys(("q_norm", "k_norm"), config.self_decoder_head_dim))
    return {f"{name}.weight": shape for name, shape in matrices.items()} | mixer.vectors(sizes(config))


def _of_mlp(prefix: str, hidden: int, ffn: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


def _of_experts(config: Any) -> dict[str, Shape]:
    """All tensors of a mixture of experts. Those that Megatron stacks in one tensor come one after another."""
    h, count = config.hidden_size, config.num_experts
    found: dict[str, Shape] = {"mlp.gate.weight": (count, h)}
    if config.use_expert_bias:
        found["mlp.gate.e_score_correction_bias"] = (count,)
    each = [_of_mlp(f"mlp.experts.{number}.", h, config.moe_intermediate_size) for number in range(count)]
    of_all = {name: shape for expert in each for name, shape in expert.items()}
    found |= dict(sorted(of_all.items(), key=lambda item: "down_proj" in item[0]))
    if config.shared_expert_intermediate_size:
        found |= _of_mlp("mlp.shared_expert.", h, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            found["mlp.shared_expert_gate.weight"] = (1, h)
    return found


def _of_attention(config: Any, matrices: dict[str, Shape], norms: dict[str, int]) -> dict[str, Shape]:
    """All tensors of softmax attention, from its matrices and the widths of its norms."""
    found = {f"{name}.weight": shape for name, shape in matrices.items()}
    if config.qkv_bias:
        found |= {f"{name}.bias": (rows,) for name, (rows, *_) in matrices.items() if name != "o_proj"}
    if config.qk_norm:
        found |= {f"{name}.weight": (width,) for name, width in norms.items()}
    return found


def _sets_of_source(config: Any) -> int:
    """Sets of shared K,V that one layer's output is projected to."""
    return config.shared_kv_sets // len(config.kv_names)


def _kv_heads_of_source(config: Any) -> int:
    """Of shared K,V: rows of their projections are ordered by head, and for one head by set."""
    return config.num_key_value_heads * _sets_of_source(config)


def layer_name(config: Any, index: int) -> str:
    """Prefix of layer `index` of the whole model; the layers of multi-token prediction come last."""
    split_layer = config.num_self_decoder_layers
    if index >= config.num_hidden_layers:
        return f"{MULTI_TOKEN}{index - config.num_hidden_layers}."
    return f"model.self_layers.{index}." if index < split_layer else f"model.cross_layers.{index - split_layer}."


class Fused(FusedMatrix):
    """A tensor of Megatron's, and how it is taken apart."""

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """The separate tensors, contiguous copies of whole [rows, ...]."""
        if len(self.names) == 1:
            return {self.names[0]: whole}
        by_head = whole.unflatten(0, (self.groups, sum(self.parts), -1))
        parts = by_head.split(self.parts, dim=1)
        return {name: part.flatten(0, 2).contiguous() for name, part in zip(self.names, parts)}

    def join(self, separate: list[Tensor]) -> Tensor:
        """What `split` took apart."""
        if len(self.names) == 1:
            return separate[0]
        by_head = [tensor.unflatten(0, (self.groups, part, -1)) for tensor, part in zip(separate, self.parts)]
        return torch.cat(by_head, dim=1).flatten(0, 2)

    def shape(self, shapes: dict[str, Shape]) -> Shape:
        """Shape of the whole, from those of the separate tensors."""
        return (sum(shapes[name][0] for name in self.names), *shapes[self.names[0]][1:])


class Stacked(Fused):
    """A tensor [groups, rows, columns] of as many experts; the separate ones are rows of one expert after another."""

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """The separate tensors, views of whole."""
        return dict(zip(self.names, whole.flatten(0, 1).chunk(len(self.names)), strict=True))

    def join(self, separate: list[Tensor]) -> Tensor:
        """What `split` took apart."""
        return torch.cat(separate).unflatten(0, (self.groups, -1))

    def shape(self, shapes: dict[str, Shape]) -> Shape:
        """Shape of the whole, from those of the separate tensors."""
        rows, columns = super().shape(shapes)
        return self.groups, rows // self.groups, columns


def megatron(config: Any) -> list[Fused]:
    """Every tensor of a training checkpoint, whole, as one process has it and as every mesh saves it."""
    entries = [Fused("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
    for index in range(config.num_hidden_layers + config.mtp_num_layers):
        ours, theirs = layer_name(config, index), f"decoder.layers.{index}."
        if index >= config.num_hidden_layers:
            of_input = f"mtp_{index - config.num_hidden_layers}."
            theirs = f"{of_input}block.layers.{index}."
            for name in ("hidden_norm", "embedding_norm", "proj"):
                of_megatron = "projection" if name == "proj" else name
                entries.append(Fused(f"{of_input}{of_megatron}.weight", (f"{ours}{name}.weight",)))

        def add(name: str, *names: str, groups: int = 1, parts: Shape = (1,), ours=ours, theirs=theirs) -> None:
            end = ".bias" if name.endswith(".bias") else ".weight"
            entries.append(Fused(f"{theirs}{name}", tuple(f"{ours}{n}{end}" for n in names), groups, parts))

        cross = index >= config.num_self_decoder_layers
        fused = [FusedMatrix("linear_q", ("q_proj",))]
        fused_norm: str | None = "linear_q"
        is_attention = True
        output, vectors = "o_proj", set[str]()
        if is_memory_unit(config, index):
            fused, fused_norm, is_attention = [FusedMatrix("linear_gate", ("in_proj",))], "linear_gate", False
            output = "out_proj"
        elif not cross:
            mixer = mixer_of_layer(config.self_decoder, index)
            fused, fused_norm = mixer.fused(sizes(config)), mixer.fused_norm
            is_attention, vectors = mixer.is_softmax_attention, {*mixer.vectors(sizes(config))}
        norm = f"self_attention.{fused_norm}.layer_norm_weight" if fused_norm else "input_layernorm.weight"
        add(norm, "input_layernorm")
        for matrix in fused:
            names = [f"mixer.{name}" for name in matrix.names]
            has_bias = (config.qkv_bias and is_attention) or f"{matrix.names[0]}.bias" in vectors
            for end in ("weight", "bias") if has_bias else ("weight",):
                vectors -= {f"{name}.{end}" for name in matrix.names}
                add(f"self_attention.{matrix.name}.{end}", *names, groups=matrix.groups, parts=matrix.parts)
        for name in sorted(vectors):
            entries.append(Fused(f"{theirs}self_attention.{name}", (f"{ours}mixer.{name}",)))
        if config.qk_norm and is_attention:
            add("self_attention.q_layernorm.weight", "mixer.q_norm")
        if config.qk_norm and is_attention and not cross:
            add("self_attention.k_layernorm.weight", "mixer.k_norm")
        add("self_attention.linear_proj.weight", f"mixer.{output}")
        if config.layers_with_experts[index]:
            entries.extend(_megatron_experts(config, ours, theirs))
            continue
        add("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm")
        add("mlp.linear_fc1.weight", "mlp.gate_proj", "mlp.up_proj", parts=(1, 1))
        add("mlp.linear_fc2.weight", "mlp.down_proj")
    for kv_name in config.kv_names.values():
        ours, theirs = f"model.{kv_name}.", f"decoder.{kv_name}."
        entries.append(Fused(f"{theirs}linear_kv.layer_norm_weight", (f"{ours}norm.weight",)))
        for end in ("weight", "bias") if config.qkv_bias else ("weight",):
            kv = (f"{ours}k_proj.{end}", f"{ours}v_proj.{end}")
            entries.append(Fused(f"{theirs}linear_kv.{end}", kv, _kv_heads_of_source(config), (1, 1)))
        for number in range(_sets_of_source(config) if config.qk_norm else 0):
            entries.append(Fused(f"{theirs}k_layernorm.{number}.weight", (f"{ours}k_norm.{number}.weight",)))
    entries.append(Fused("final_layernorm.weight", ("model.norm.weight",)))
    if not config.tie_word_embeddings:
        entries.append(Fused("output_layer.weight", ("lm_head.weight",)))
    return entries


def _megatron_experts(config: Any, ours: str, theirs: str) -> list[Fused]:
    """Those of a layer's mixture of experts and of the norm before it. Prefixes of the layer are given."""
    count, mlp = config.num_experts, f"{ours}mlp."
    entries = [
        Fused(f"{theirs}pre_mlp_layernorm.weight", (f"{ours}post_attention_layernorm.weight",)),
        Fused(f"{theirs}mlp.router.weight", (f"{mlp}gate.weight",)),
    ]
    if config.use_expert_bias:
        entries.append(Fused(f"{theirs}mlp.router.expert_bias", (f"{mlp}gate.e_score_correction_bias",)))
    for name, parts in (("linear_fc1", ("gate_proj", "up_proj")), ("linear_fc2", ("down_proj",))):
        names = tuple(f"{mlp}experts.{number}.{part}.weight" for number in range(count) for part in parts)
        entries.append(Stacked(f"{theirs}mlp.experts.experts.{name}.weight", names, count))
        if config.shared_expert_intermediate_size:
            names = tuple(f"{mlp}shared_expert.{part}.weight" for part in parts)
            entries.append(Fused(f"{theirs}mlp.shared_experts.{name}.weight", names, parts=(1,) * len(parts)))
    if config.shared_expert_intermediate_size and config.shared_expert_gate:
        entries.append(Fused(f"{theirs}mlp.shared_experts.gate_weight", (f"{mlp}shared_expert_gate.weight",)))
    return entries


# What the others call a part of a name; the first that fits is taken.
FLA = {
    "model.embed_tokens.": "model.embeddings.",
    "model.shared_kv.norm.": "model.shared_kv_builder.kv_norm.",
    "model.shared_kv.": "model.shared_kv_builder.",
    ".mixer.decay_proj.": ".attn.gk_proj.",
    ".mixer.norm.": ".attn.o_norm.",
    **{f".mixer.{name}_conv.": f".attn.{name}_conv1d." for name in "qkv"},
    ".mixer.": ".attn.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}
OFFICIAL = {
    "model.embed_tokens.": "embed_tokens.",
    "model.norm.": "layer_norm.",
    "lm_head.": "output_projection.",
    "model.shared_kv.norm.": "cross_decoder.kv_layer_norm.",
    "model.shared_kv.": "cross_decoder.",
    ".mixer.decay_proj.": ".mixer.gt_proj.",
    ".mixer.o_proj.": ".mixer.out_proj.",
    ".input_layernorm.": ".mixer_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    # silu is on fc1 there, not on what is called gate
    ".mlp.gate_proj.": ".ffn.fc1.",
    ".mlp.up_proj.": ".ffn.gate.",
    ".mlp.down_proj.": ".ffn.fc2.",
    "model.self_layers.": "self_decoder.layers.",
    "model.cross_layers.": "cross_decoder.layers.",
}


def fla(name: str) -> str:
    """fla's name (YOCOForCausalLM of flash-linear-attention) of one of our tensors."""
    for ours, theirs in FLA.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def pairs_to_halves(config: YocoConfig, name: str, tensor: Tensor, back: bool = False) -> Tensor:
    """A tensor of ours as fla has it, or `back`.

    RoPE rotates the rows 2i, 2i+1 of a head in all of our layers and in fla's retention and cross-attention, and the
    rows i, i+D/2 in fla's windows. So rows of their queries and keys change places; their products stay the same.
    """
    of_windows = [*mixers_in(config.self_decoder)] == [SLIDING_WINDOW] and name.startswith("model.self_layers.")
    if not of_windows or not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return tensor
    half = config.self_decoder_head_dim // 2
    split = (-1, 2, half) if back else (-1, half, 2)
    return tensor.unflatten(0, split).transpose(1, 2).flatten(0, 2)


def official(name: str) -> str:
    """The name in the authors' checkpoint.pth."""
    for ours, theirs in OFFICIAL.items():
        name = name.replace(ours, theirs)
    return name
