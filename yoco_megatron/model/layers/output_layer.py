"""Output layer and loss in one, for a model that never holds the logits of a whole micro-batch."""

from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from yoco_megatron.model.layers.main_grad import buffer_of
from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy


def compute_loss_in_chunks(
    output_layer: tensor_parallel.ColumnParallelLinear,
    chunk_size: int,
    tp_group: ProcessGroup,
    fuse_weight_gradient: bool,
) -> None:
    """Make `output_layer(hidden_states, weight=, labels=)` return losses, fp32 [b, s], instead of logits.

    It remains a call of the module, because Megatron hangs work on that: with --overlap-param-gather it waits there
    until the weight has come from the other ranks.

    Args:
        chunk_size: tokens whose logits exist at a time.
        fuse_weight_gradient: send the weight's gradient straight to the buffer that Megatron sums gradients in
            (--gradient-accumulation-fusion, Megatron's default where Transformer Engine is).
    """
    logits = output_layer.forward

    def forward(hidden_states: Tensor, weight: Tensor | None = None, labels: Tensor | None = None, **more):
        if labels is None:
            return logits(hidden_states, weight=weight, **more)
        weight = output_layer.weight if weight is None else weight
        sequence_parallel = output_layer.config.sequence_parallel
        return chunked_loss(
            hidden_states, weight, labels, sequence_parallel, chunk_size, tp_group, fuse_weight_gradient
        )

    output_layer.forward = forward


def chunked_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_parallel: bool,
    chunk_size: int,
    tp_group: ProcessGroup,
    fuse_weight_gradient: bool,
) -> Tensor:
    """Losses, fp32 [b, s].

    Args:
        hidden_states: [s, b, h], normalised ([s/tp, b, h] with sequence parallelism).
        weight: [V/tp, h]; labels: int64 [b, s].
        chunk_size: tokens whose logits exist at a time.
    """
    if sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    main_grad = buffer_of(weight) if fuse_weight_gradient else None
    rows = labels.t()
    x, words = hidden_states.flatten(0, 1), rows.flatten()
    losses = linear_cross_entropy(x, weight, words, chunk_size, tp_group, main_grad)
    return losses.view_as(rows).t().contiguous()
