"""What window and cross attention share: softmax attention of each context-parallel chunk, and the output projection.

The chunks and documents of a micro-batch are described by a `SequenceShard`. A query attends to its own document alone.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yoco_megatron.model.layers.projections import output_projection, save_original_input
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.query_shard import QueryShard
from yoco_megatron.parallel.context.sequence_shard import CPChunk, SequenceShard, VisibleKeys

KeysOf = Callable[[int, CPChunk, int], tuple[Tensor, Tensor]]
"""(index of a chunk held here, the chunk, first position) -> keys and values [chunk.stop - first, b, G, D]."""


class ChunkedAttention(MegatronModule):
    """`core_attention` (Transformer Engine's or torch's) chunk by chunk, and the output projection.

    Args:
        submodules: `core_attention` and `linear_proj`.
        left_window: earlier keys that a query attends to; None for all.
    """

    linear_in: str
    """Name of the projection of the layer's input."""

    def __init__(
        self,
        config: YOCOConfig,
        submodules: Any,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        attention_type: str,
        left_window: int | None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.pg_collection, self.left_window = layer_number, pg_collection, left_window
        self.head_dim = config.kv_channels
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        core_config = copy.copy(config)
        core_config.context_parallel_size = 1  # keys of other ranks are fetched here, not by the kernel
        core_config.window_size = None if left_window is None else (left_window, 0)
        self.core_attention = submodules.core_attention(
            config=core_config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type=attention_type,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.linear_proj = output_projection(
            submodules.linear_proj, config, config.num_attention_heads * self.head_dim, pg_collection.tp
        )
        if config.fp8 and config.fp8_recipe != "delayed":
            # The attention kernel saves this input anyway; a quantised copy beside it would waste memory.
            save_original_input(self.linear_proj)

    def attend(self, query: Tensor, keys_of: KeysOf, shard: SequenceShard | QueryShard, *saved: Tensor) -> Tensor:
        """query [s, b, H, D] -> [s, b, H * D].

        `saved` are tensors that `keys_of` takes as further arguments, for selective recompute to save.
        """

        def core(query: Tensor, *saved: Tensor) -> Tensor:
            outputs = []
            # Avoid a split into one here and full-range slices below: their backward copies the gradient.
            lengths = [cp_chunk.stop - cp_chunk.start for cp_chunk in shard.chunks]
            parts = [query] if len(lengths) == 1 else query.split(lengths)
            for index, (cp_chunk, queries) in enumerate(zip(shard.chunks, parts)):
                visible = shard.visible_keys(cp_chunk, self.left_window)
                key, value = keys_of(index, cp_chunk, min(visible.first), *saved)
                outputs.append(self._attend(queries, key, value, visible))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        return self.checkpoint_core(core, query, *saved)

    def checkpoint_core(self, core: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """core(*inputs), recomputed in backward with --recompute-granularity selective."""
        if self.recompute_core and self.training:
            return tensor_parallel.checkpoint(core, False, *inputs)
        return core(*inputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: VisibleKeys) -> Tensor:
        """One chunk: query [s, b, H, D], key and value [s', b, G, D] -> [s, b, H * D]."""
        length, batch = query.shape[:2]
        if self.left_window is not None and key.shape[0] > length:
            # cuDNN's backward of a window takes ten times as long with fewer queries than keys
            # (benchmarks/chunk_attention.py), so pad the chunk's queries on the left to as many as keys.
            query = F.pad(query, (0, 0, 0, 0, 0, 0, key.shape[0] - length, 0))
        if visible.packed is None:
            mask = AttnMaskType.causal if query.shape[0] == key.shape[0] else AttnMaskType.causal_bottom_right
            out = self.core_attention(query, key, value, None, mask)
            return out if out.shape[0] == length else out[-length:]
        starts = [first - min(visible.first) for first in visible.first]
        laid_out = (_lay_end_to_end(x, starts) for x in (query, key, value))
        out = self.core_attention(*laid_out, None, AttnMaskType.padding_causal, packed_seq_params=visible.packed)
        if out.shape[0] == batch * length:
            return out.reshape(batch, length, -1).transpose(0, 1)
        samples = out.split([query.shape[0] - start for start in starts])
        return torch.stack([sample[-length:] for sample in samples], dim=1)

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients (called by Megatron's schedules)."""
        self.linear_proj.backward_dw()
        getattr(self, self.linear_in).backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm: save the norm's input instead of its quantised output."""
        save_original_input(getattr(self, self.linear_in))


def _lay_end_to_end(x: Tensor, first: list[int]) -> Tensor:
    """[s, b, heads, D] -> [tokens, heads, D]: one sample after the other, each from row first[sample] on."""
    if x.shape[1] == 1:
        return x[first[0] :].squeeze(1)
    return torch.cat([x[row:, sample] for sample, row in enumerate(first)])
