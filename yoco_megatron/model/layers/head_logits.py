"""A small projection to one logit a head: it stays whole on every rank, out of tensor parallelism and FP8."""

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from yoco_megatron.model.yoco_config import YOCOConfig


class HeadLogits(torch.nn.Linear):
    """Hidden states -> logits of this tensor-parallel rank's heads, [s, b, H].

    Every rank computes all heads from the tokens that it holds, and only the small result is exchanged: gathering the
    hidden states a second time would cost as much as the communication of a large projection.
    """

    def __init__(self, config: YOCOConfig, heads: int, tp_group: ProcessGroup) -> None:
        super().__init__(
            config.hidden_size, heads, bias=False, device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        self.tp_group, self.sequence_parallel = tp_group, config.sequence_parallel
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = super().forward(hidden_states)
        if self.tp_group.size() == 1:
            return logits
        if not self.sequence_parallel:
            return tensor_parallel.scatter_to_tensor_model_parallel_region(logits, group=self.tp_group)
        _, batch, heads = logits.shape
        logits = tensor_parallel.all_to_all_sp2hp(logits, group=self.tp_group)
        return logits.view(-1, batch, heads // self.tp_group.size())
