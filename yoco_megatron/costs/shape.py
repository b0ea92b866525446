"""`ModelShape`: the sizes that decide parameters, FLOPs and memory, without a model, a mesh or a GPU.

Planner, FLOP counter and tests read sizes from here, so that they agree with each other. The counts (paper
2405.05254 section 2 and the authors' code; d hidden, F FFN width, h query heads and g
K,V heads of width D, V vocabulary):

    self layer    its mixer's (`mixers`) + 3 d F + 2 d
    shared K,V    n 2 d g D + m d                  (two projections for each of n sets, one in a YOCO, and a norm for
                                                    each of their m sources, one in a YOCO)
    cross layer   2 d h D + 3 d F + 2 d            (queries and output only)
    memory unit   2 d W + 3 d F + 2 d              (a cross layer of --cross-decoder-pattern, W the width of the memory)
    multi-token   2 d^2 + 2 d + a cross layer, for each (--mtp-num-layers)
    transformer   2 d h D + 2 d g D + 3 d F + 2 d  (the Llama-style baseline: each layer has its own K,V)
    final norm    d
    embedding     V d, and the output layer another V d unless tied

and of softmax attention, with --qk-layernorm D for its queries and D for its keys (those of each set of shared K,V),
with --add-qkv-bias one for each row of its q, k, v.

In a layer with E experts of width W, of which a token goes through k, the FFN's 3 d F is 3 d W E and the router's d E,
and 3 d S of a shared expert (another d with a gate); of these a token reads 3 d W k + d E + 3 d S. Where only some
layers have experts (--moe-layer-freq), or layers of the self-decoder have several mixers, or some of the cross-decoder
are memory units, what is said of one layer is the mean over those of its kind, in the whole model or on one pipeline
rank (`ModelShape.of_layers`).
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, cached_property
from math import prod
from typing import Any, Literal, Self

from yoco_megatron.config import experts
from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.config.memory_units import attention_layers, is_memory_unit, memory_width
from yoco_megatron.config.resolve import resolved
from yoco_megatron.config.rules import check_sizes
from yoco_megatron.mixers import Mixer, mixer_of_layer, mixers_in


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; names are those of the flags. Build it with `from_args`, or all fields by hand.

    For architecture "transformer" the self-decoder fields are zero: every layer attends to its own K,V.
    Raises ValueError, naming the flag, for sizes that describe no model.
    """

    architecture: Literal["yoco", "transformer"]
    self_decoder: str
    """Name of its mixer, or its pattern (`mixers`)."""
    num_layers: int
    num_self_decoder_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """K,V heads of the cross-decoder's one shared K,V (transformer: of each layer)."""
    kv_channels: int
    """Width of one of `num_attention_heads` heads."""
    self_decoder_heads: int
    self_decoder_head_dim: int
    """Width of one of `self_decoder_heads` heads (keys and values alike)."""
    self_decoder_query_groups: int
    self_decoder_window: int
    """Keys that a sliding-window query attends to, itself included."""
    padded_vocab_size: int | None
    """None until the tokenizer is built; only what counts the vocabulary asks for it."""
    seq_length: int
    tied: bool
    """The output layer is the embedding matrix."""
    mamba_num_heads: int | None = None
    """Of Mamba-2; None in a model without it, whose fields below have no meaning."""
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8
    shared_kv_sets: int = 1
    """K,V that groups of cross-decoder layers share; `num_query_groups` and `kv_channels` are those of each."""
    shared_kv_sources: tuple[int, ...] | None = None
    """Layers of the self-decoder that they are projected from, from 1; None for its last."""
    cross_decoder_pattern: str | None = None
    """A letter for each layer of the cross-decoder (`config.memory_units`); None if all attend."""
    qk_layernorm: bool = False
    """Softmax attention has a norm of its queries and one of its keys, over the width of a head."""
    add_qkv_bias: bool = False
    """Its projections to queries, keys and values have biases."""
    num_queries: int | None = None
    """Last positions of a sequence that the cross-decoder and the head compute (--loss-suffix); None for all."""
    num_experts: int | None = None
    """Of a layer that has them; None for no mixture of experts, and no meaning of the fields below."""
    moe_layer_freq: int | tuple[int, ...] = 1
    moe_ffn_hidden_size: int | None = None
    """Of one expert."""
    moe_router_topk: int = 2
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    mtp_num_layers: int = 0
    """Of multi-token prediction: cross-decoder layers behind the last."""
    means_over: tuple[int, ...] | None = None
    """Layers of the model, where not all; see `of_layers`."""

    def __post_init__(self) -> None:
        check_sizes(self)
        experts.check_sizes(self)

    @cached_property
    def mixers(self) -> dict[Mixer, float]:
        """Those of the self-decoder, each with its share of the layers."""
        own = [index for index in self.means_over or () if index < self.num_self_decoder_layers]
        if not own:
            return mixers_in(self.self_decoder)
        counts = Counter(mixer_of_layer(self.self_decoder, index) for index in own)
        return {mixer: count / len(own) for mixer, count in counts.items()}

    def mean(self, of_mixer: Callable[[Mixer], float]) -> float:
        """Of one layer of the self-decoder, in the mean over its mixers."""
        mixers = self.mixers
        if len(mixers) == 1:  # whole numbers stay whole
            return of_mixer(*mixers)
        return sum(share * of_mixer(mixer) for mixer, share in mixers.items())

    @cached_property
    def layers_differ(self) -> bool:
        """Whether those of one half do: mixers, memory units, experts."""
        sorts, own = _sorts_of_layers(self), self.num_self_decoder_layers
        return len(set(sorts[:own])) > 1 or len(set(sorts[own:])) > 1

    def of_layers(self, layers: Sequence[int]) -> "ModelShape":
        """The same model; what is said of one layer in the mean is of these alone, such as those of a pipeline rank.

        Equal for layers that are as many of each sort.
        """
        return _of_layers(self, tuple(layers))

    @property
    def num_cross_decoder_layers(self) -> int:
        """Layers that read the shared K,V (0 for a transformer, which has none)."""
        return self.num_layers - self.num_self_decoder_layers if self.architecture == "yoco" else 0

    @property
    def attention_share(self) -> float:
        """Of the cross-decoder's layers, those that attend to the shared K,V."""
        cross = [index for index in self.means_over or () if index >= self.num_self_decoder_layers]
        if not cross:
            return attention_layers(self) / max(1, self.num_cross_decoder_layers)
        return sum(not is_memory_unit(self, index) for index in cross) / len(cross)

    @cached_property
    def of_mtp(self) -> "ModelShape":
        """The shape of which one cross-decoder layer costs what one of multi-token prediction does: all attend."""
        if self.cross_decoder_pattern is None and self.means_over is None:
            return self
        return replace(self, cross_decoder_pattern=None, means_over=None)

    @property
    def kv_width(self) -> int:
        """Values of one token's keys and values: of one set of the shared K,V (transformer: one layer's)."""
        return 2 * self.num_query_groups * self.kv_channels

    @property
    def sets_of_source(self) -> int:
        """Sets of K,V that the output of one source is projected to."""
        return self.shared_kv_sets // len(sources_of(self))

    @property
    def computed_queries(self) -> int:
        """Positions of a sequence that the cross-decoder and the head compute."""
        return self.seq_length if self.num_queries is None else self.num_queries

    @property
    def query_share(self) -> float:
        """Of the positions of a sequence, those that the cross-decoder and the head compute."""
        return self.computed_queries / self.seq_length

    def layers_of(self, kind: str) -> int:
        """Layers of a kind of `layer_matmul_parameters`."""
        counts = {"self_decoder": self.num_self_decoder_layers, "cross_decoder": self.num_cross_decoder_layers}
        return counts.get(kind, self.num_layers)

    def experts_share(self, kind: str) -> float:
        """Of the layers of a kind, those with experts."""
        if not self.num_experts:
            return 0.0  # without a list of layers, of which a mistaken --num-layers has billions
        return self._experts_shares.get(kind, 0.0)

    @cached_property
    def _experts_shares(self) -> dict[str, float]:
        has = experts.layers_with_experts(self.num_experts, self.moe_layer_freq, self.num_layers)
        layers: Sequence[int] = self.means_over or range(self.num_layers)
        split = self.num_self_decoder_layers
        of_kinds = {
            "self_decoder": [has[index] for index in layers if index < split],
            "cross_decoder": [has[index] for index in layers if index >= split],
            "decoder": [has[index] for index in layers],
        }
        return {kind: sum(of_kind) / max(1, len(of_kind)) for kind, of_kind in of_kinds.items()}

    def ffn_widths(self, kind: str) -> tuple[float, float]:
        """Values that a token has between the two products of an FFN, in the mean over layers of a kind: (in FFNs, in
        the experts that it goes through)."""
        share = self.experts_share(kind)
        routed = self.moe_router_topk * (self.moe_ffn_hidden_size or 0) if share else 0
        return (1 - share) * self.ffn_hidden_size, share * (routed + (self.moe_shared_expert_intermediate_size or 0))

    def ffn_width(self, kind: str) -> float:
        """Both together."""
        return sum(self.ffn_widths(kind))

    @property
    def vocab_rows(self) -> int:
        """The padded vocabulary. Raises ValueError while it is not known."""
        if self.padded_vocab_size is None:
            raise ValueError("the padded vocabulary size is not known: set --vocab-size, or build the tokenizer first")
        return self.padded_vocab_size

    @classmethod
    def from_args(cls, args: Namespace) -> Self:
        """Read the sizes from Megatron's arguments, before or after its own validation.

        What is None gets its default (`config.resolve`); the vocabulary may still be unknown.
        Raises ValueError for another size that is missing.
        """
        sizes = vars(resolved(args)) | {"tied": not args.untie_embeddings_and_output_weights}
        if args.architecture == "transformer":
            sizes |= {field.name: 0 for field in fields(cls) if "self_decoder_" in field.name}
        if not sizes.get("num_experts"):
            sizes |= {field.name: field.default for field in fields(cls) if field.name.startswith("moe_")}
        elif isinstance(sizes["moe_layer_freq"], list):
            sizes["moe_layer_freq"] = tuple(sizes["moe_layer_freq"])
        sizes["mtp_num_layers"] = sizes.get("mtp_num_layers") or 0
        if sizes.get("shared_kv_sources"):
            sizes["shared_kv_sources"] = tuple(sizes["shared_kv_sources"])
        # The flags of an older run lack newer sizes, which have defaults.
        named = [field.name for field in fields(cls) if field.name in sizes or field.default is MISSING]
        read: dict[str, Any] = {name: sizes.get(name) for name in named}
        return cls(**read)


@cache
def _sorts_of_layers(shape: ModelShape) -> list[tuple]:
    """Of each layer its half, its mixer, whether it is a memory unit and whether it has experts."""
    has = experts.layers_with_experts(shape.num_experts, shape.moe_layer_freq, shape.num_layers)
    own = shape.num_self_decoder_layers
    names = [mixer_of_layer(shape.self_decoder, index).name for index in range(own)]
    units = [is_memory_unit(shape, index) for index in range(own, shape.num_layers)]
    return [*zip(names, has), *zip([None] * len(units), units, has[own:])]


@cache
def _of_layers(shape: ModelShape, layers: tuple[int, ...]) -> ModelShape:
    sorts = _sorts_of_layers(shape)
    held = Counter(sorts[index] for index in layers)
    first_of_each = []  # equal for all that hold as many
    for index, sort in enumerate(sorts):
        if held[sort]:
            held[sort] -= 1
            first_of_each.append(index)
    return replace(shape, means_over=tuple(first_of_each))


@cache
def layer_matmul_parameters(shape: ModelShape, active: bool = False) -> Mapping[str, float]:
    """Weights of the projections of one layer of each kind, norms left out; `shared_kv` counts as a kind, and so do all
    layers of multi-token prediction together, `mtp`, where there are any.

    Args:
        active: of all experts, those alone that a token goes through. Twice this number is the forward FLOPs per token.
    """
    d = shape.hidden_size
    q_and_out = 2 * d * shape.num_attention_heads * shape.kv_channels
    k_and_v = d * shape.kv_width
    if shape.architecture == "transformer":
        return {"decoder": q_and_out + k_and_v + _ffn_parameters(shape, "decoder", active)}
    mixer = shape.mean(lambda mixer: mixer.matmul_parameters(shape))
    of_ffn, share = _ffn_parameters(shape, "cross_decoder", active), shape.attention_share
    return {
        "self_decoder": mixer + _ffn_parameters(shape, "self_decoder", active),
        "shared_kv": shape.sets_of_source * k_and_v,
        "cross_decoder": share * q_and_out + (1 - share) * 2 * d * memory_width(shape) + of_ffn,
        **_mtp(shape, 2 * d * d + q_and_out + of_ffn),
    }


def _mtp(shape: ModelShape, of_layer: float) -> dict[str, float]:
    return {"mtp": shape.mtp_num_layers * of_layer} if shape.mtp_num_layers else {}


def _ffn_parameters(shape: ModelShape, kind: str, active: bool) -> float:
    """In the mean over the layers of a kind."""
    d, share = shape.hidden_size, shape.experts_share(kind)
    dense = 3 * d * shape.ffn_hidden_size
    if not share or not shape.num_experts or not shape.moe_ffn_hidden_size:
        return dense
    routed = 3 * d * shape.moe_ffn_hidden_size * (shape.moe_router_topk if active else shape.num_experts)
    shared = 3 * d * (shape.moe_shared_expert_intermediate_size or 0) + d * shape.moe_shared_expert_gate
    return (1 - share) * dense + share * (routed + d * shape.num_experts + shared)


def attention_parameters(shape: ModelShape) -> dict[str, float]:
    """Of one layer of each kind of `layer_matmul_parameters`, those that attention transfer trains: all but the FFN and
    norms."""
    matmul = layer_matmul_parameters(shape)
    ffns = {kind: 0 if kind == "shared_kv" else _ffn_parameters(shape, kind, False) for kind in matmul}
    return {kind: count - ffns[kind] for kind, count in matmul.items()}


def routed_parameters(shape: ModelShape, kind: str | None = None) -> int:
    """Those of all experts but shared ones and routers, in one layer of a kind in the mean, or in the whole model."""
    if not shape.num_experts or not shape.moe_ffn_hidden_size:
        return 0
    layer = 3 * shape.hidden_size * shape.moe_ffn_hidden_size * shape.num_experts
    if kind is not None:
        return round(layer * shape.experts_share(kind))
    return layer * sum(experts.layers_with_experts(shape.num_experts, shape.moe_layer_freq, shape.num_layers))


def active_parameters(shape: ModelShape) -> int:
    """Of the whole model, those that one token goes through: all but the experts that it is not routed to."""
    inactive = 0.0
    for kind, weights in layer_matmul_parameters(shape).items():
        if kind not in ("shared_kv", "mtp"):
            inactive += shape.layers_of(kind) * (weights - layer_matmul_parameters(shape, active=True)[kind])
    return sum(parameter_count(shape).values()) - round(inactive)


def layer_linear_values(shape: ModelShape) -> dict[str, float]:
    """Values a token of the inputs and outputs of one layer's linear layers: what FP8 casts, forward and backward."""
    d, queries = shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    attention, share = 2 * (d + queries), shape.attention_share
    unit = 2 * (d + memory_width(shape))

    def ffn(kind: str) -> float:
        return 2 * d + 3 * shape.ffn_width(kind)

    if shape.architecture == "transformer":
        return {"decoder": attention + shape.kv_width + ffn("decoder")}
    # All matrices of a mixer read or write the hidden states.
    outputs = shape.mean(lambda mixer: mixer.matmul_parameters(shape)) / d
    return {
        "self_decoder": outputs + 2 * d + ffn("self_decoder"),
        "cross_decoder": share * attention + (1 - share) * unit + ffn("cross_decoder"),
    }


@cache
def layer_vectors(shape: ModelShape) -> Mapping[str, float]:
    """Weights of the norms, and biases, of one layer of each kind of `layer_matmul_parameters`."""
    d, queries, width = shape.hidden_size, shape.num_attention_heads * shape.kv_channels, shape.kv_channels

    def of_attention(query_values: int, kv_values: int, norms: int) -> int:
        return shape.add_qkv_bias * (query_values + kv_values) + shape.qk_layernorm * norms

    if shape.architecture == "transformer":
        return {"decoder": 2 * d + of_attention(queries, shape.kv_width, 2 * width)}
    own_width = shape.self_decoder_head_dim
    own_queries, own_kv = shape.self_decoder_heads * own_width, 2 * shape.self_decoder_query_groups * own_width

    def of_mixer(mixer: Mixer) -> int:
        attention = of_attention(own_queries, own_kv, 2 * own_width) if mixer.is_softmax_attention else 0
        return attention + sum(map(prod, mixer.vectors(shape).values()))

    return {
        "self_decoder": 2 * d + shape.mean(of_mixer),
        "shared_kv": d + shape.sets_of_source * of_attention(0, shape.kv_width, width),
        "cross_decoder": 2 * d + shape.attention_share * of_attention(queries, 0, width),
        **_mtp(shape, 4 * d + of_attention(queries, 0, width)),
    }


@cache
def parameter_count(shape: ModelShape) -> Mapping[str, int]:
    """Parameters of each part of the model; the parts add up to the whole, padded vocabulary included.

    Keys: embedding, self_decoder, shared_kv, cross_decoder, mtp if there is any (a transformer has `decoder` in place
    of these), final_norm, output_layer (0 if tied). Formulas: see the module.
    Raises ValueError if the vocabulary size is not known yet.
    """
    d = shape.hidden_size
    matmul, vectors = layer_matmul_parameters(shape), layer_vectors(shape)
    embedding = shape.vocab_rows * d
    if shape.architecture == "transformer":
        counts = {"decoder": shape.num_layers}
    else:
        own, cross = shape.num_self_decoder_layers, shape.num_cross_decoder_layers
        counts = {
            "self_decoder": own,
            "shared_kv": len(sources_of(shape)),
            "cross_decoder": cross,
            **({"mtp": 1} if shape.mtp_num_layers else {}),
        }
    layers = {kind: round(count * (matmul[kind] + vectors[kind])) for kind, count in counts.items()}
    return {"embedding": embedding, **layers, "final_norm": d, "output_layer": 0 if shape.tied else embedding}


def body_parameters(shape: ModelShape) -> int:
    """Parameters without embedding and output layer: the paper's "non-embedding parameters"."""
    count = parameter_count(shape)
    return sum(count.values()) - count["embedding"] - count["output_layer"]
