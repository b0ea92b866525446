"""Output layer and loss in one, for a model that never holds the logits of a whole micro-batch."""

import torch
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
    fuse_weight_gradient: bool,
) -> Tensor:
    """Losses, fp32 [b, s].

    With --gradient-accumulation-fusion (Megatron's default where Transformer Engine is) the weight's gradient goes
    straight to the buffer that Megatron sums gradients in.

    Args:
        hidden_states: [s, b, h], normalised ([s/tp, b, h] with sequence parallelism).
        weight: [V/tp, h]; labels: int64 [b, s].
        chunk_size: tokens whose logits exist at a time.
    """
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    main_grad = getattr(weight, "main_grad", None) if fuse_weight_gradient and torch.is_grad_enabled() else None
    if main_grad is not None:
        weight.grad_added_to_main_grad = True  # Megatron's gradient hook then leaves autograd's zeros alone
    rows = labels.t()
    x, words = hidden_states.flatten(0, 1), rows.flatten()
    losses = linear_cross_entropy(x, weight, words, chunk_size, tp_group, main_grad)
    return losses.view_as(rows).t().contiguous()
