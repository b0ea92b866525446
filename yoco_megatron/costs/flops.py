"""FLOPs of the model: what the mathematics needs, for MFU, TFLOP/s and the planner.

One multiply-add is 2 FLOPs and only matrix products count: no norms, RoPE, activations or softmax. What an
implementation adds does not count: no recompute, no masked half of causal attention, no padding. Per token:

    linear             2 x weights                     (an embedding look-up is no product)
    causal attention   4 h D (N + 1) / 2               query i sees i + 1 of N keys: the exact mean
    window attention   4 h D mean_i min(i + 1, W)      exact as well, the short start included
    other mixers       see `mixers`

Behind the shared K,V only positions with a loss count (`ModelShape.num_queries`): the last M of N see N - (M - 1) / 2
keys in the mean.

The backward pass costs twice the forward: each product has two gradients of its own size.
"""

from yoco_megatron.costs.shape import ModelShape, layer_matmul_parameters
from yoco_megatron.mixers.sliding_window import mean_visible_keys


def layer_flops_per_token(shape: ModelShape) -> dict[str, dict[str, float]]:
    """Forward FLOPs per token of ONE layer of each kind, as {kind: {"linear": ..., "mixing": ...}}.

    Kinds are those of `layer_matmul_parameters`; mixing moves information between tokens (attention,
    retention). The planner cuts pipeline stages by these numbers.
    """
    width = shape.num_attention_heads * shape.kv_channels
    share = shape.query_share
    keys_of_queries = shape.seq_length - (share * shape.seq_length - 1) / 2
    causal_attention = 4 * width * keys_of_queries * share
    if shape.architecture == "transformer":
        mixing = {"decoder": 4 * width * mean_visible_keys(shape.seq_length)}
    else:
        mixing = {"self_decoder": shape.mixer.mixing_flops(shape), "cross_decoder": causal_attention}
    return {
        kind: {"linear": 2.0 * weights * (share if kind == "cross_decoder" else 1), "mixing": mixing.get(kind, 0.0)}
        for kind, weights in layer_matmul_parameters(shape).items()
    }


def forward_flops_per_token(shape: ModelShape) -> dict[str, float]:
    """Forward FLOPs per token of the whole model, averaged over a sequence of `shape.seq_length`.

    Keys: `<kind>_linear` and `<kind>_mixing` for self_decoder and cross_decoder (transformer: decoder), all
    layers of the kind together; shared_kv; output_layer. Their sum is the model's. Formulas: see the module.
    """
    layers = {
        "decoder": shape.num_layers,
        "self_decoder": shape.num_self_decoder_layers,
        "cross_decoder": shape.num_cross_decoder_layers,
    }
    flops: dict[str, float] = {}
    for kind, parts in layer_flops_per_token(shape).items():
        if kind == "shared_kv":
            flops[kind] = parts["linear"]
        else:
            flops |= {f"{kind}_{part}": layers[kind] * value for part, value in parts.items()}
    return flops | {"output_layer": 2.0 * shape.hidden_size * shape.vocab_rows * shape.query_share}


def train_flops(shape: ModelShape, batch_size: int) -> float:
    """FLOPs of one step on `batch_size` sequences: three times the forward, whatever is recomputed."""
    return 3 * sum(forward_flops_per_token(shape).values()) * batch_size * shape.seq_length
