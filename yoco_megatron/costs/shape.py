"""`ModelShape`: the sizes that decide parameters, FLOPs and memory, without a model, a mesh or a GPU.

Planner, FLOP counter and tests read sizes from here, so that they agree with each other. The counts (paper
2405.05254 section 2 and the authors' code, which has no biases; d hidden, F FFN width, h query heads and g
K,V heads of width D, h_s retention heads, V vocabulary):

    self layer    gated retention 5 d^2 + d h_s ,  sliding window 4 d^2 ;  + 3 d F + 2 d
    shared K,V    2 d g D + d                      (two projections and their own norm, once)
    cross layer   2 d h D + 3 d F + 2 d            (queries and output only)
    transformer   2 d h D + 2 d g D + 3 d F + 2 d  (the Llama-style baseline: each layer has its own K,V)
    final norm    d
    embedding     V d, and the output layer another V d unless tied
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal, Self

from yoco_megatron.config.rules import fill_in_defaults
from yoco_megatron.utils.errors import require


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; names are those of the flags. Build it with `from_args`, or all fields by hand.

    For architecture "transformer" the self-decoder fields are zero: every layer attends to its own K,V.
    Raises ValueError, naming the flag, for sizes that describe no model.
    """

    architecture: Literal["yoco", "transformer"]
    self_decoder: Literal["gated_retention", "sliding_window"]
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
    self_decoder_query_groups: int
    self_decoder_window: int
    """Keys that a sliding-window query sees, itself included."""
    padded_vocab_size: int | None
    """None until the tokenizer is built; only what counts the vocabulary asks for it."""
    seq_length: int
    tied: bool
    """The output layer is the embedding matrix."""

    def __post_init__(self) -> None:
        require(self.architecture in ("yoco", "transformer"), f"--architecture {self.architecture} is unknown")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"--num-attention-heads {self.num_attention_heads} is not a multiple of --num-query-groups "
            f"{self.num_query_groups}: each K,V head serves a whole group",
        )
        if self.architecture == "transformer":
            return
        require(
            self.self_decoder in ("gated_retention", "sliding_window"),
            f"--self-decoder {self.self_decoder} is unknown",
        )
        require(
            0 <= self.num_self_decoder_layers < self.num_layers,
            f"--num-self-decoder-layers {self.num_self_decoder_layers} must lie between 0 and "
            f"--num-layers - 1 = {self.num_layers - 1}: at least one layer has to read the shared K,V",
        )
        require(
            self.hidden_size % self.self_decoder_heads == 0
            and self.self_decoder_heads % self.self_decoder_query_groups == 0,
            f"--self-decoder-heads {self.self_decoder_heads} must divide --hidden-size {self.hidden_size} "
            f"and be a multiple of --self-decoder-query-groups {self.self_decoder_query_groups}",
        )

    @property
    def num_cross_decoder_layers(self) -> int:
        """Layers that read the shared K,V (0 for a transformer, which has none)."""
        return self.num_layers - self.num_self_decoder_layers if self.architecture == "yoco" else 0

    @property
    def self_decoder_head_dim(self) -> int:
        """D_s, the width of one self-decoder head (keys and values alike)."""
        return self.hidden_size // self.self_decoder_heads

    @property
    def vocab_rows(self) -> int:
        """The padded vocabulary. Raises ValueError while it is not known."""
        require(
            self.padded_vocab_size is not None,
            "the padded vocabulary size is not known: set --vocab-size, or build the tokenizer first",
        )
        return self.padded_vocab_size

    @classmethod
    def from_args(cls, args: Namespace) -> Self:
        """Read the sizes from Megatron's arguments, before or after its own validation.

        `None` means what it means to the model: half of the layers in the self-decoder, as many self-decoder
        heads as attention heads, no grouping. The vocabulary may still be unknown.
        Raises ValueError for another size that is missing.
        """
        for dest in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
            require(getattr(args, dest) is not None, f"--{dest.replace('_', '-')} is missing: set it")
        heads = args.num_attention_heads
        ffn_hidden_size = args.ffn_hidden_size
        if ffn_hidden_size is None:
            # What Megatron chooses for SwiGLU when it validates: 8/3 x hidden, down to a multiple of 64.
            ffn_hidden_size = int((4 * args.hidden_size * 2 / 3) / 64) * 64
        is_yoco = args.architecture == "yoco"
        own = Namespace(**vars(args))
        if is_yoco:
            fill_in_defaults(own)
        return cls(
            architecture=args.architecture,
            self_decoder=args.self_decoder,
            num_layers=args.num_layers,
            num_self_decoder_layers=own.num_self_decoder_layers if is_yoco else 0,
            hidden_size=args.hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=heads,
            # Megatron's own default for the groups is 1, and means nothing without the switch.
            num_query_groups=args.num_query_groups if args.group_query_attention else heads,
            kv_channels=args.hidden_size // heads if args.kv_channels is None else args.kv_channels,
            self_decoder_heads=own.self_decoder_heads if is_yoco else 0,
            self_decoder_query_groups=own.self_decoder_query_groups if is_yoco else 0,
            self_decoder_window=args.self_decoder_window if is_yoco else 0,
            padded_vocab_size=getattr(args, "padded_vocab_size", None),
            seq_length=args.seq_length,
            tied=not args.untie_embeddings_and_output_weights,
        )


def layer_matmul_parameters(shape: ModelShape) -> dict[str, int]:
    """Weights of the projections of one layer of each kind, norms left out; `shared_kv` counts as a kind.

    Twice this number is their forward FLOPs per token, which is why costs/flops.py reads it.
    """
    d = shape.hidden_size
    ffn = 3 * d * shape.ffn_hidden_size
    q_and_out = 2 * d * shape.num_attention_heads * shape.kv_channels
    k_and_v = 2 * d * shape.num_query_groups * shape.kv_channels
    if shape.architecture == "transformer":
        return {"decoder": q_and_out + k_and_v + ffn}
    self_attention = 2 * d * d + 2 * d * shape.self_decoder_query_groups * shape.self_decoder_head_dim
    if shape.self_decoder == "gated_retention":
        self_attention += d * d + d * shape.self_decoder_heads  # the output gate, and one decay logit per head
    return {"self_decoder": self_attention + ffn, "shared_kv": k_and_v, "cross_decoder": q_and_out + ffn}


def parameter_count(shape: ModelShape) -> dict[str, int]:
    """Parameters of each part of the model; the parts add up to the whole, padded vocabulary included.

    Keys: embedding, self_decoder, shared_kv, cross_decoder (a transformer has `decoder` in place of these
    three), final_norm, output_layer (0 if tied). Formulas: see the module.
    Raises ValueError if the vocabulary size is not known yet.
    """
    d = shape.hidden_size
    matmul = layer_matmul_parameters(shape)
    embedding = shape.vocab_rows * d
    if shape.architecture == "transformer":
        layers = {"decoder": shape.num_layers * (matmul["decoder"] + 2 * d)}
    else:
        layers = {
            "self_decoder": shape.num_self_decoder_layers * (matmul["self_decoder"] + 2 * d),
            "shared_kv": matmul["shared_kv"] + d,
            "cross_decoder": shape.num_cross_decoder_layers * (matmul["cross_decoder"] + 2 * d),
        }
    return {"embedding": embedding, **layers, "final_norm": d, "output_layer": 0 if shape.tied else embedding}


def body_parameters(shape: ModelShape) -> int:
    """Parameters without embedding and output layer: the paper's "non-embedding parameters"."""
    count = parameter_count(shape)
    return sum(count.values()) - count["embedding"] - count["output_layer"]
