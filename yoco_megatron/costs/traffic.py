"""Bytes that context parallelism moves: what each rank receives from others for a micro-batch, on average over ranks.

With C ranks, s tokens a sequence (all ranks together), b sequences, e bytes a value, G K,V heads and H retention heads
of this tensor-parallel rank, widths D of the cross-decoder and D_s of the self-decoder, window W:

    window, a layer and direction     2 (C-1) / C  (W-1) b 2 G_s D_s e      (W - 1 <= s / 2C)
    retention, a layer, forward       (C-1) 2 b H (D_s^2 + 1) 4             (states and decays in fp32)
    retention, a layer, backward      (C-1) 2 b H D_s^2 4
    shared K,V, a stage, forward      (C-1) / C  s b 2 G D e
    shared K,V, a stage, backward     (C-1) / C  s b 2 G D 4                (gradients summed in fp32)

A Transformer with ring or all-gather attention receives in every layer the K,V, (C-1) / C s b 2 G D e, forward and
again backward, and their gradients, as much once more. Full recompute repeats what layers do in forward; it does not
gather the shared K,V again.
"""

from yoco_megatron.costs.shape import ModelShape


def boundary_bytes(shape: ModelShape, tokens: int, bytes_per_value: int, with_kv: bool) -> int:
    """Of the tensor that enters a pipeline stage: hidden states and, once it exists, the shared K,V."""
    return tokens * (shape.hidden_size + with_kv * shape.kv_width) * bytes_per_value


def received_bytes(
    shape: ModelShape, ranks: int, micro_batch_size: int = 1, bytes_per_value: int = 2, recompute: bool = False
) -> dict[str, float]:
    """Received for a micro-batch of the whole model in one stage, without tensor parallelism, by kind of exchange.

    Keys: self_decoder and shared_kv for a YOCO, attention for a Transformer.
    """
    others = (ranks - 1) / ranks
    kv = shape.seq_length * micro_batch_size * shape.kv_width
    forward_passes = 2 if recompute else 1
    if shape.architecture == "transformer":
        return {"attention": shape.num_layers * others * kv * bytes_per_value * (forward_passes + 2)}
    layer = shape.mixer.received_bytes(shape, ranks, micro_batch_size, bytes_per_value, forward_passes)
    return {
        "self_decoder": shape.num_self_decoder_layers * layer,
        "shared_kv": others * kv * (bytes_per_value + 4),
    }
