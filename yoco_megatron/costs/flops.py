"""FLOPs of the model: what the mathematics needs, for MFU, TFLOP/s and the planner.

One multiply-add is 2 FLOPs and only matrix products count: no norms, RoPE, activations or softmax. What an
implementation adds does not count: no recompute, no masked half of causal attention, no padding. Per token:

    linear             2 x weights                     (of experts those that a token goes through; an embedding
                                                       look-up is no product)
    causal attention   4 h D (N + 1) / 2               query i sees i + 1 of N keys: the exact mean
    window attention   4 h D mean_i min(i + 1, W)      exact as well, the short start included
    other mixers       see `mixers`

Behind the shared K,V only positions that are computed count (`Queries`): the last M of N (`ModelShape.num_queries`) see
N - (M - 1) / 2 keys in the mean.

The backward pass costs twice the forward: each product has two gradients of its own size.
"""

from dataclasses import dataclass

from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.costs.shape import ModelShape, layer_matmul_parameters
from yoco_megatron.mixers.sliding_window import mean_visible_keys


@dataclass(frozen=True)
class Queries:
    """What is computed behind the shared K,V, per token of the sequences in the mean."""

    share: float
    """Of the positions."""
    keys: float
    """That they attend to."""

    @classmethod
    def of(cls, shape: ModelShape) -> "Queries":
        """The last positions of a sequence."""
        return cls(
            shape.query_share, shape.query_share * (shape.seq_length - (shape.query_share * shape.seq_length - 1) / 2)
        )


def layer_flops_per_token(shape: ModelShape, queries: Queries | None = None) -> dict[str, dict[str, float]]:
    """Forward FLOPs per token of ONE layer of each kind, as {kind: {"linear": ..., "mixing": ...}}.

    Kinds are those of `layer_matmul_parameters`; mixing moves information between tokens (attention,
    retention). The planner cuts pipeline stages by these numbers. `queries` None: as `shape` says.
    """
    width = shape.num_attention_heads * shape.kv_channels
    queries = queries or Queries.of(shape)
    causal_attention = 4 * width * queries.keys
    if shape.architecture == "transformer":
        mixing = {"decoder": 4 * width * mean_visible_keys(shape.seq_length)}
    else:
        mixing = {"cross_decoder": shape.attention_share * causal_attention}
        mixing["self_decoder"] = shape.mean(lambda mixer: mixer.mixing_flops(shape))
        mixing["mtp"] = shape.mtp_num_layers * causal_attention
    return {
        kind: {
            "linear": 2.0 * weights * (queries.share if kind in ("cross_decoder", "mtp") else 1),
            "mixing": mixing.get(kind, 0.0),
        }
        for kind, weights in layer_matmul_parameters(shape, active=True).items()
    }


def forward_flops_per_token(shape: ModelShape, queries: Queries | None = None) -> dict[str, float]:
    """Forward FLOPs per token of the whole model, averaged over a sequence of `shape.seq_length`.

    Keys: `<kind>_linear` and `<kind>_mixing` for self_decoder and cross_decoder (transformer: decoder), all
    layers of the kind together, and mtp; shared_kv; output_layer. Their sum is the model's. Formulas: see the module.
    """
    layers = {
        "decoder": shape.num_layers,
        "self_decoder": shape.num_self_decoder_layers,
        "cross_decoder": shape.num_cross_decoder_layers,
        "mtp": 1,
        "shared_kv": len(sources_of(shape)),
    }
    queries = queries or Queries.of(shape)
    flops: dict[str, float] = {}
    for kind, parts in layer_flops_per_token(shape, queries).items():
        if kind == "shared_kv":
            flops[kind] = layers[kind] * parts["linear"]
        else:
            flops |= {f"{kind}_{part}": layers[kind] * value for part, value in parts.items()}
    heads = 1 + shape.mtp_num_layers  # one head, as often as tokens are predicted
    return flops | {"output_layer": heads * 2.0 * shape.hidden_size * shape.vocab_rows * queries.share}


def train_flops(shape: ModelShape, batch_size: int, queries: Queries | None = None) -> float:
    """FLOPs of one step on `batch_size` sequences: three times the forward, whatever is recomputed."""
    return 3 * sum(forward_flops_per_token(shape, queries).values()) * batch_size * shape.seq_length
