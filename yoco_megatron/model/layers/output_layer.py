"""Output layer and loss in one, for a model that never holds the logits of a whole micro-batch."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from yoco_megatron.model.layers.main_grad import claim_main_grad
from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy


class ChunkedLossOutputLayer(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer, which, given labels, returns losses instead of logits.

    Both are calls of the module, because Megatron hangs work on that: with --overlap-param-gather it waits there until
    the weight has come from the other ranks.

    `convert` makes one: in a GPTModel, Megatron builds the layer, and has no door for its class.
    """

    loss_chunk_size: int
    fuse_weight_gradient: bool
    has_z_loss: bool

    @classmethod
    def convert(
        cls,
        layer: tensor_parallel.ColumnParallelLinear,
        loss_chunk_size: int,
        fuse_weight_gradient: bool,
        has_z_loss: bool = False,
    ) -> None:
        """Make an output layer that has been built one of these, in place.

        Args:
            loss_chunk_size: tokens whose logits exist at a time.
            fuse_weight_gradient: add the weight's gradient straight to the buffer that Megatron sums gradients in
                (--gradient-accumulation-fusion, Megatron's default where Transformer Engine is).
            has_z_loss: return the z-loss, too (--z-loss-coeff).
        """
        assert type(layer) is tensor_parallel.ColumnParallelLinear
        layer.__class__ = cls
        layer.loss_chunk_size, layer.fuse_weight_gradient = loss_chunk_size, fuse_weight_gradient
        layer.has_z_loss = has_z_loss

    def forward(
        self, hidden_states: Tensor, weight: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Losses, or, without labels, Megatron's logits and bias.

        Args:
            hidden_states: [s, b, h], normalised ([s/tp, b, h] with sequence parallelism).
            weight: [V/tp, h], where it is not this layer's own; labels: int64 [b, s].
            kwargs: Megatron's, without labels; with them what `losses` takes besides.
        Returns:
            fp32 losses [b, s], or [terms, b, s] of several.
        """
        if labels is None:
            return super().forward(hidden_states, weight=weight, **kwargs)
        weight = self.weight if weight is None else weight
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        main_grad = claim_main_grad(weight) if self.fuse_weight_gradient else None
        rows = labels.t()
        x, flat_labels = hidden_states.flatten(0, 1), rows.flatten()
        losses = self.losses(x, weight, flat_labels, main_grad, **kwargs)
        return losses.unflatten(-1, rows.shape).transpose(-2, -1).contiguous()

    def losses(self, x: Tensor, weight: Tensor, labels: Tensor, main_grad: Tensor | None) -> Tensor:
        """fp32 losses [N] of normalised hidden states x [N, h], the same on all tensor-parallel ranks; or [2, N], cross
        entropy and z-loss (PaLM, arXiv 2204.02311 section 5): the square of the logarithm of the softmax's sum."""
        losses, log_sum = linear_cross_entropy(x, weight, labels, self.loss_chunk_size, self.tp_group, main_grad)
        return torch.stack((losses, log_sum.square())) if self.has_z_loss else losses
