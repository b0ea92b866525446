"""`YOCOFields`: the switches that a YOCO model adds to Megatron's flags (arXiv 2405.05254).

Field names are flag names: `self_decoder_heads` is `--self-decoder-heads` on the command line and in a YAML config.
Defaults are the paper's; every deviation from it is a switch here.
"""

from argparse import Action, ArgumentParser, Namespace
from dataclasses import dataclass, field
from typing import Any, Literal

from yoco_megatron.mixers import pattern_of


class StorePattern(Action):
    """Stores a mixer's name or a pattern; argparse calls it with the words that the flag was given."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        """Raises ValueError for an unknown mixer."""
        setattr(namespace, self.dest, pattern_of(values))


@dataclass
class YOCOFields:
    """The model's own switches; everything else is a Megatron flag."""

    architecture: Literal["yoco", "transformer"] = "yoco"
    """yoco: self-decoder, one shared K,V, cross-decoder. transformer: the Llama-style baseline, Megatron's own GPT."""

    self_decoder: str = field(
        default="gated_retention",
        metadata={
            "argparse_meta": {
                "arg_names": ["--self-decoder", "--self-decoder-pattern"],
                "action": StorePattern,
                "nargs": "+",
                "metavar": "MIXER",
            }
        },
    )
    """Mixer of the self-decoder layers: gated_retention (R) or sliding_window (S; paper sections 3 and 2.1), mamba2
    (M) or gated_delta_net (G). Or of each layer its own: one letter a layer (RRSS), or as many names
    (docs/mixers.md)."""

    num_self_decoder_layers: int | None = None
    """Layers of the self-decoder; the rest are cross-decoder layers. 0 gives the paper's [0:1] ablation.
    Default: half of --num-layers."""

    self_decoder_heads: int | None = None
    """Heads of the self-decoder. The paper's scaling runs use hidden-size/256 for gated retention.
    Default: --num-attention-heads."""

    self_decoder_head_dim: int | None = None
    """Width of one head of the self-decoder, as --kv-channels is of the cross-decoder.
    Default: --hidden-size / --self-decoder-heads."""

    self_decoder_query_groups: int | None = None
    """K,V heads of sliding-window layers. Default: --self-decoder-heads (the paper uses no GQA in the self-decoder)."""

    self_decoder_window: int = 1024
    """Keys that a sliding-window query attends to, itself included."""

    decay_temperature: float = 16.0
    """tau of gated retention: decay = sigmoid(x w)^(1/tau) (paper equation 5)."""

    shared_kv_sets: int | None = None
    """Sets of K,V that the self-decoder's output is projected to; each is read by an equal group of neighbouring
    cross-decoder layers. The paper has one. The cache grows with their number. Default: one for each of
    --shared-kv-sources."""

    shared_kv_sources: list[int] | None = field(
        default=None,
        metadata={
            "argparse_meta": {"arg_names": ["--shared-kv-sources"], "type": int, "nargs": "+", "metavar": "LAYER"}
        },
    )
    """Layers of the self-decoder, counted from 1 and ascending, whose outputs are projected to K,V, each to as many
    sets. Default: its last layer alone, as in the paper."""

    cross_decoder_pattern: str | None = None
    """A letter for each layer of the cross-decoder: A attends to the shared K,V, G is a gated memory unit (SambaY),
    which gates the readout of the self-decoder's last recurrent layer. Default: A for all."""

    rope_variant: Literal["yoco", "standard"] = "yoco"
    """yoco: frequencies theta^-linspace(0,1), interleaved pairs (the authors' code). standard: theta^(-2j/d), with the
    pairing that --rotary-interleaved chooses."""

    scale_embedding: bool = True
    """Multiply embeddings by sqrt(hidden-size), as the authors do (--no-scale-embedding: do not)."""

    init_law: Literal["yoco", "megatron"] = "yoco"
    """yoco: the authors' laws, per module. megatron: normal of --init-method-std, output layers scaled by depth."""

    retention_backend: str = "auto"
    """Implementation of gated retention; tools/doctor.py lists what this machine can run."""

    gated_delta_backend: str = "auto"
    """Implementation of gated DeltaNet's recurrence: fla, flash-linear-attention's kernels, or torch. auto: the first
    that can run."""

    fp32_kv_transport: bool = False
    """Send the shared K,V, and with them their gradients, between pipeline stages in fp32 instead of bf16."""

    retention_chunk_size: int = 128
    """Chunk of the chunkwise torch implementation (changes rounding and memory, not the function)."""

    recompute_elementwise: bool = False
    """Recompute in backward, instead of storing, outputs of cheap elementwise ops whose inputs are stored anyway: that
    of SwiGLU, and the retention's normalised and gated output. bf16 only: FP8 keeps quantised copies."""

    keep_cross_attention: bool = False
    """With --recompute-granularity full: store the output of each cross-decoder layer's attention, as large as the
    layer's input, instead of recomputing attention. For long sequences, where attention is most of the work."""

    loss_chunk_size: int | None = None
    """Most tokens whose logits exist at a time while the loss is computed; 0: all of a micro-batch. A 32K-token
    sequence with a 100K vocabulary needs 13 GB of fp32 logits, a chunk of 8192 tokens 1.6 GB in bf16. Default: 8192 for
    YOCO; 0, which is Megatron's own loss, for the Transformer baseline and with --fp16-lm-cross-entropy or
    --cross-entropy-loss-fusion."""

    z_loss_coeff: float = 0.0
    """Weight of the z-loss, the mean square of the logarithm of the softmax's sum, which keeps logits from drifting
    (PaLM has 1e-4). The loss that is reported stays the cross entropy; the z-loss has a place of its own."""

    loss_suffix: str | None = None
    """Train only on the last tokens of each sequence: a number of tokens, a share of the sequence, or values for
    several lengths (65536:0.25,262144:4096). The cross-decoder is then only computed there (docs/masked_loss.md)."""

    cross_decoder_positions: Literal["loss", "all"] = "loss"
    """Where the cross-decoder, the head and the loss are computed: where there is a loss, or at all positions. Losses
    and gradients are the same."""

    cp_cross_attention: Literal["auto", "keys", "queries"] = "auto"
    """What context-parallel ranks exchange for cross attention: once all keys and values (keys), or in each layer the
    queries, where only some positions have a loss (queries). auto: what is fewer bytes."""
