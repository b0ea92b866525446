"""What window and cross attention share: softmax attention of each chunk's queries, documents apart, and the output.

The chunks and documents of a micro-batch are a `SequenceShard`; the layers get it as Megatron's `packed_seq_params`,
which TransformerLayer and its recompute hand on untouched.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
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
from yoco_megatron.parallel.context.sequence_shard import Chunk, SequenceShard, Sight

# Megatron's enum has no name for Transformer Engine's mask of packed documents with fewer queries than keys.
PADDING_CAUSAL_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")

KeysOf = Callable[[int, Chunk, int], tuple[Tensor, Tensor]]
"""(index of a chunk held here, the chunk, first position) -> keys and values [chunk.stop - first, b, G, D]."""


class ChunkedAttention(MegatronModule):
    """`core_attention` (Transformer Engine's or torch's) chunk by chunk, and the output projection.

    Args:
        submodules: `core_attention` and `linear_proj`.
        reach: earlier keys that a query sees; None for all.
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
        reach: int | None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.pg_collection, self.reach = layer_number, pg_collection, reach
        self.head_dim = config.kv_channels
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # keys of other ranks are fetched here, not by the kernel
        self.core_attention = submodules.core_attention(
            config=alone,
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
            # The attention kernel keeps this input anyway; a quantised copy beside it would be memory for nothing.
            save_original_input(self.linear_proj)

    def attend(self, query: Tensor, keys_of: KeysOf, shard: SequenceShard, *saved: Tensor) -> Tensor:
        """query [s, b, H, D] -> [s, b, H * D].

        `saved` are tensors that `keys_of` takes as further arguments, for selective recompute to save.
        """

        def core(query: Tensor, *saved: Tensor) -> Tensor:
            outputs = []
            # Not chunk(1) of a whole, and below no slice of all: their backward would copy the gradient.
            parts = [query] if len(shard.chunks) == 1 else query.chunk(len(shard.chunks))
            for index, (chunk, queries) in enumerate(zip(shard.chunks, parts)):
                sight = shard.sight(chunk, self.reach)
                key, value = keys_of(index, chunk, min(sight.first), *saved)
                outputs.append(self._attend(queries, key, value, sight))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        return self.keep_or_recompute(core, query, *saved)

    def keep_or_recompute(self, core: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """core(*inputs), run again in backward if selective recompute says so."""
        if self.recompute_core and self.training:
            return tensor_parallel.checkpoint(core, False, *inputs)
        return core(*inputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        """One chunk: query [s, b, H, D], key and value [s', b, G, D] -> [s, b, H * D]."""
        length, batch = query.shape[:2]
        if self.reach is not None and key.shape[0] > length:
            # cuDNN's backward of a window takes ten times as long with fewer queries than keys
            # (benchmarks/chunk_attention.py): before the chunk's stand queries of nobody.
            query = F.pad(query, (0, 0, 0, 0, 0, 0, key.shape[0] - length, 0))
        square = query.shape[0] == key.shape[0]
        if sight.packed is None:
            mask = AttnMaskType.causal if square else AttnMaskType.causal_bottom_right
            out = self.core_attention(query, key, value, None, mask)
            return out if out.shape[0] == length else out[-length:]
        starts = [first - min(sight.first) for first in sight.first]
        out = self.core_attention(
            _lay_end_to_end(query, starts if square else [0] * batch),
            _lay_end_to_end(key, starts),
            _lay_end_to_end(value, starts),
            None,
            AttnMaskType.padding_causal if square else PADDING_CAUSAL_BOTTOM_RIGHT,
            packed_seq_params=sight.packed,
        )
        if out.shape[0] == batch * length:
            return out.reshape(batch, length, -1).transpose(0, 1)
        samples = out.split([query.shape[0] - start for start in starts])
        return torch.stack([sample[-length:] for sample in samples], dim=1)

    def backward_dw(self) -> None:
        """Delayed weight gradients, as Megatron's schedules call them."""
        self.linear_proj.backward_dw()
        getattr(self, self.linear_in).backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm keeps the norm's input instead of its quantised output."""
        save_original_input(getattr(self, self.linear_in))


def _lay_end_to_end(x: Tensor, first: list[int]) -> Tensor:
    """[s, b, heads, D] -> [tokens, heads, D]: sample after sample, each from its own first row on."""
    if x.shape[1] == 1:
        return x[first[0] :].squeeze(1)
    return torch.cat([x[row:, sample] for sample, row in enumerate(first)])
