"""The short causal convolution of a mixer, over documents and context-parallel chunks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from yoco_megatron.model.layers.cut_by_head import CutByHead
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.short_convolution import short_convolution
from yoco_megatron.parallel.context.halo import rows_with_halo
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

WIDTH = 4
"""Of the kernel, as in Mamba-2 and gated DeltaNet."""


class ShortConvolution(CutByHead):
    """x [s, b, C] -> silu(convolution of each channel) [s, b, C]; C are the channels of this tensor-parallel rank.

    Args:
        channels: of all ranks, ordered so that each rank has the channels of its heads.
        bias: each channel has one.

    `weight` is [C, 1, W], as in torch's Conv1d; optimizers of whole matrices leave it to Adam.
    """

    def __init__(self, config: YOCOConfig, channels: int, tp_group: ProcessGroup, bias: bool) -> None:
        super().__init__(config, tp_group)
        self.weight = self.parameter(channels, 1, WIDTH)
        self.bias = self.parameter(channels) if bias else None

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        chunks = rows_with_halo(x, WIDTH - 1, shard) if shard.ranks > 1 else (x,)
        outputs = []
        for cp_chunk, rows in zip(shard.chunks, chunks):
            ids = shard.document_ids
            if ids is not None:
                ids = ids[:, cp_chunk.stop - len(rows) : cp_chunk.stop]
            y, _ = short_convolution(rows.transpose(0, 1), self.weight.squeeze(1), self.bias, document_ids=ids)
            outputs.append(y.transpose(0, 1)[len(rows) - shard.chunk_length :])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
