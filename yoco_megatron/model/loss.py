"""Output layer and loss in one, for a model that never holds the logits of a whole micro-batch."""

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy


def chunked_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: TransformerConfig,
    chunk_size: int,
    tp_group: ProcessGroup,
) -> Tensor:
    """Losses, fp32 [b, s].

    Args:
        hidden_states: [s, b, h], normalised ([s/tp, b, h] with sequence parallelism).
        weight: [V/tp, h]; labels: int64 [b, s].
        chunk_size: tokens whose logits exist at a time.
    """
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    rows = labels.t()
    losses = linear_cross_entropy(hidden_states.flatten(0, 1), weight, rows.flatten(), chunk_size, tp_group)
    return losses.view_as(rows).t().contiguous()
