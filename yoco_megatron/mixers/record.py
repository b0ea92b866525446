"""`Mixer`: what the rest of the system must know of a self-decoder mixer, in one record.

Every field must be given. None says that a part is not built; whoever asks for that part then gets one error.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, Protocol

Shape = tuple[int, ...]


class Sizes(Protocol):
    """What a record reads of a model: `costs.shape.ModelShape` has these, for example."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def self_decoder_heads(self) -> int: ...
    @property
    def self_decoder_query_groups(self) -> int: ...
    @property
    def self_decoder_head_dim(self) -> int: ...
    @property
    def self_decoder_window(self) -> int: ...
    @property
    def mamba_num_heads(self) -> int | None: ...
    @property
    def mamba_head_dim(self) -> int: ...
    @property
    def mamba_state_dim(self) -> int: ...
    @property
    def mamba_num_groups(self) -> int: ...
    @property
    def seq_length(self) -> int: ...


@dataclass(frozen=True)
class FusedMatrix:
    """A matrix of the training checkpoint and the exported ones that it is made of.

    Rows come in `groups` groups; each holds `parts[i]` heads of `names[i]`, so that tensor parallelism cuts between
    groups. With one group it cuts each of them by itself.
    """

    name: str
    names: tuple[str, ...]
    groups: int = 1
    parts: tuple[int, ...] = (1,)
    is_logits: bool = False
    """Each row is a logit of its own, as in the output layer: optimizers of whole matrices leave it to Adam."""


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """One mixer. Paths are "module:attribute", resolved when they are needed, so that a record loads no torch."""

    name: str
    """Value of --self-decoder."""

    letter: str
    """Of one layer in --self-decoder-pattern; a capital."""

    options: tuple[str, ...]
    """Flags that no other mixer reads, by their fields; with one that lacks them they are refused."""

    check: Callable[[Sizes], None]
    """Rules of its own sizes, without `seq_length`: raises ValueError that names the flag."""

    divided: Callable[[Sizes], dict[str, int]]
    """Sizes that tensor parallelism divides, by flag."""

    # The model.
    layer_spec: str
    """Path of `spec(backend: BackendSpecProvider) -> ModuleSpec` of a whole layer. The mixer is called with
    (hidden_states [s, b, h], rotary_pos_emb=angles, packed_seq_params=SequenceShard)."""
    init_law: str
    """Path of `law(name, shape) -> model.init.Law | None` of a parameter by its name inside the mixer and its whole
    shape, [out, in] for matrices; None: the law of every other matrix; what is no matrix must have one."""
    init_name: str
    """What initialisation calls the mixer in a parameter's global name, from which its random numbers come."""

    is_softmax_attention: bool
    """Queries and keys meet in a softmax: --qk-layernorm and --add-qkv-bias, made for it, apply (`model.layers.norm`'s
    `head_norm`, `model.layers.projections`)."""

    separates_documents: bool
    """Nothing of a packed document reaches another one (`SequenceShard.folded_document_ids`)."""

    # Costs of one layer; projections are counted apart from what mixes tokens.
    matmul_parameters: Callable[[Sizes], int]
    """Weights of its projections."""
    mixing_flops: Callable[[Sizes], float]
    """Forward FLOPs a token beside the projections, averaged over a sequence."""
    flop_rate: Callable[[str], float]
    """FLOP/s at which mixing runs in training, by --retention-backend; for the pipeline planner, which needs ratios."""
    stored_bytes: Callable[[Sizes, int], float]
    """(sizes, bytes a value) -> bytes a token that the mixer stores for backward, beside its layer's input and norm."""
    recomputed_values: Callable[[Sizes], int]
    """Values a token that --recompute-elementwise does not store."""
    received_bytes: Callable[[Sizes, int, int, int, int], float]
    """Context parallelism: (sizes, ranks, sequences, bytes a value, forward passes) -> bytes that a rank receives for a
    micro-batch, backward included, on average over the ranks."""

    memory_width: Callable[[Sizes], int]
    """Values a token of its memory, which gated memory units read: the readout of its state that its own gate
    multiplies. Of a layer that is asked for it the mixer appends it, [s, b, width/tp], to `attention_bias`. 0: it has
    none."""

    # Conversion and generation.
    tensors: Callable[[Sizes], dict[str, Shape]]
    """Exported matrices by their names inside the mixer, in the order of the forward pass, [out, in] each."""
    vectors: Callable[[Sizes], dict[str, Shape]]
    """Exported tensors that are no matrices, by whole names in the mixer; not those of --qk-layernorm and biases."""
    fused: Callable[[Sizes], list[FusedMatrix]]
    """The same in a training checkpoint, without the output projection `linear_proj` (`o_proj`) and without vectors
    that have the same names there."""
    fused_norm: str | None
    """The projection that the layer's norm is fused into in a training checkpoint; None: the norm stands apart."""
    hf_layer_type: str
    """What transformers calls the layer, which decides its cache and its attention mask; hf/ has a table of its own."""
    fla_type: str | None
    """`self_decoder_attn.type` in flash-linear-attention; None: there it does not exist."""
    cache_bytes: Callable[[Sizes, int], int]
    """(sizes, bytes a value) -> bytes of a sequence's cache in one layer, whatever the sequence's length."""
    cache: str
    """What that cache is, in words."""
    description: Callable[[Sizes], str]
    """What it is, in words."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and field.name not in ("fused_norm", "fla_type"):
                object.__setattr__(self, field.name, _NotBuilt(self.name, field.name))

    def require(self, field: str, wanted_by: str = "") -> Any:
        """The value of `field`. Raises ValueError, naming the flag that `wanted_by` it, where the record has none."""
        value = getattr(self, field)
        if isinstance(value, _NotBuilt):
            replace(value, wanted_by=wanted_by)()
        return value

    def load(self, field: str) -> Any:
        """What the path in `field` names. Raises ValueError where the record has none."""
        module, _, attribute = self.require(field).partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class _NotBuilt:
    """Stands for a part that a record leaves out, and refuses to be called."""

    mixer: str
    field: str
    wanted_by: str = ""

    def __call__(self, *_: Any) -> NoReturn:
        raise ValueError(
            f"{self.wanted_by or 'this'} is not built for --self-decoder {self.mixer}, whose record (in "
            f"yoco_megatron.mixers) has no {self.field}: use another --self-decoder, or add it"
        )
