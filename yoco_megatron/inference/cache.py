"""The caches of a decoding engine, in transformers' interface: `model(..., past_key_values=BlockCache(...))`.

* a global K,V grows by blocks that are never moved (or lies in one region reserved at the start);
* a window is a ring: token p lies in slot p mod W, and nothing moves when it slides;
* a retention state is one fp32 tensor, updated in place.

A layer's `update` returns itself, and the attention implementation below hands the queries to it: so the model's own
code runs, and so does any other decoder of transformers', such as the Transformer that we are compared with.

Prompts come in pieces of the same length in every row. Positions of a decoding step live on the device, so that the
step can be a CUDA graph (engine.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from yoco_megatron.ops.attention.decode import TILE, BlockTable, append, decode_attention, place, splits_for

IMPLEMENTATION = "yoco_blocks"


def attend(module: Any, query: Tensor, key: "KVLayer", value: Any, mask: None, scaling: float, **_: Any) -> tuple:
    """transformers' attention interface: query [b, H, s, D] -> ([b, s, H, D], None)."""
    return key.attend(query, scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend)


class KVLayer:
    """What both kinds of K,V have in common: a table of blocks that a step reads and writes by position."""

    def __init__(self, cache: "BlockCache") -> None:
        self.cache = cache
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple["KVLayer", "KVLayer"]:
        """Take the K,V [b, G, s, D] of new tokens."""
        self.prepare(k, v)
        if self.cache.decoding:
            self.append(k, v)
        else:
            self.new = (k, v)
            self.store(k, v)
        return self, self


class GlobalKV(KVLayer):
    """All tokens' K,V in blocks of `capacity` tokens [b, G, capacity, D]; queries see all of them, causally."""

    def __init__(self, cache: "BlockCache") -> None:
        super().__init__(cache)
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.table: Any = None

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make room on the first call; later `grow` does."""
        if self.table is None:
            self.shape = (k.shape[0], k.shape[1], k.shape[3])
            self.places = torch.zeros(2, self.cache.max_blocks, dtype=torch.int64, device=k.device)
            # Whatever allocation that lives as long as the cache.
            self.anchor = k.new_empty(64)
            self.table = self.cache.table(self.anchor, *self.places, *self.strides())
        if not self.cache.decoding:
            self.grow(self.cache.length + k.shape[2])

    def strides(self) -> tuple[int, int]:
        """Of sequences and of heads, in elements."""
        _, groups, width = self.shape
        tokens = self.cache.reserve or self.cache.capacity
        return groups * tokens * width, tokens * width

    def grow(self, length: int) -> None:
        """Blocks for `length` tokens. Nothing that is there moves."""
        batch, groups, width = self.shape
        capacity, reserve = self.cache.capacity, self.cache.reserve
        if reserve and not self.blocks:
            whole = tuple(self.anchor.new_empty(batch, groups, reserve, width) for _ in range(2))
            self.blocks = [
                tuple(t[:, :, at : at + capacity] for t in whole) for at in range(0, reserve, capacity)
            ]  # views into one region
            self._enter(0)
        while len(self.blocks) * capacity < length:
            if reserve:
                raise ValueError(f"the cache was reserved for {reserve} tokens, {length} are needed")
            self.blocks.append(tuple(self.anchor.new_empty(batch, groups, capacity, width) for _ in range(2)))
            self._enter(len(self.blocks) - 1)

    def _enter(self, first: int) -> None:
        new = torch.tensor([[place(block[i], self.anchor) for block in self.blocks[first:]] for i in (0, 1)])
        self.places[:, first : len(self.blocks)] = new.to(self.places.device)

    def store(self, k: Tensor, v: Tensor) -> None:
        start, capacity = self.cache.length, self.cache.capacity
        done = 0
        while done < k.shape[2]:
            number, at = divmod(start + done, capacity)
            count = min(capacity - at, k.shape[2] - done)
            for block, new in zip(self.blocks[number], (k, v)):
                block[:, :, at : at + count] = new[:, :, done : done + count]
            done += count

    def append(self, k: Tensor, v: Tensor) -> None:
        if k.is_cuda:
            append(k[:, :, 0], v[:, :, 0], self.table, self.cache.position)
        else:
            number, at = divmod(int(self.cache.position), self.cache.capacity)
            for block, new in zip(self.blocks[number], (k, v)):
                block[:, :, at] = new[:, :, 0]

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """q [b, H, n, D] are the last n tokens' queries."""
        if self.cache.decoding:
            return self.cache.attend_one(q, self.table, self.cache.position + 1, scaling, self._whole)
        end = self.cache.length + self.new[0].shape[2]
        if q.shape[2] == 1:  # the last token of a piece: it sees everything
            length = torch.tensor([end], device=q.device)
            return self.cache.attend_one(q, self.table, length, scaling, self._whole)
        if self.cache.length == 0:
            return causal(q, *self.new, scaling, None)
        return causal(q, *self._whole(end), scaling, None)

    def _whole(self, end: int) -> tuple[Tensor, Tensor]:
        """K and V of the first `end` tokens: views of a reserved region, copies of blocks."""
        if self.cache.reserve:
            first = self.blocks[0]
            shape = (*first[0].shape[:2], end, first[0].shape[3])
            return tuple(torch.as_strided(t, shape, t.stride(), t.storage_offset()) for t in first)
        return tuple(torch.cat([block[i] for block in self.blocks], dim=2)[:, :, :end] for i in (0, 1))

    def tensors(self) -> list[Tensor]:
        return [t for block in self.blocks for t in block]


class WindowKV(KVLayer):
    """The last W tokens' K,V in a ring [b, G, W, D]."""

    def __init__(self, cache: "BlockCache", window: int) -> None:
        super().__init__(cache)
        self.window = window
        self.ring: tuple[Tensor, Tensor] | None = None

    def prepare(self, k: Tensor, v: Tensor) -> None:
        if self.ring is None:
            capacity = -(-self.window // TILE) * TILE
            shape = (k.shape[0], k.shape[1], capacity, k.shape[3])
            self.ring = (k.new_zeros(shape), k.new_zeros(shape))
            places = [torch.tensor([place(t, self.ring[0])], device=k.device) for t in self.ring]
            strides = (shape[1] * capacity * shape[3], capacity * shape[3])
            self.table = self.cache.table(self.ring[0], *places, *strides, capacity=capacity)

    def store(self, k: Tensor, v: Tensor) -> None:
        start, length = self.cache.length, k.shape[2]
        before = torch.arange(max(0, start - self.window + 1), start, device=k.device) % self.window
        self.seen = tuple(torch.cat((t[:, :, before], new), dim=2) for t, new in zip(self.ring, (k, v)))
        kept = torch.arange(max(start, start + length - self.window), start + length, device=k.device)
        for t, new in zip(self.ring, (k, v)):
            t[:, :, kept % self.window] = new[:, :, kept - start]

    def append(self, k: Tensor, v: Tensor) -> None:
        slot = self.cache.position % self.window
        for t, new in zip(self.ring, (k, v)):
            t.index_copy_(2, slot, new)

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        if self.cache.decoding:
            length = (self.cache.position + 1).clamp(max=self.window)
            return self.cache.attend_one(q, self.table, length, scaling, lambda end: [t[:, :, :end] for t in self.ring])
        seen, self.seen = self.seen, None
        return causal(q, *seen, scaling, self.window)

    def tensors(self) -> list[Tensor]:
        return list(self.ring or ())


class RetentionState:
    """The recurrent state of a retention layer, fp32, in one place."""

    def __init__(self) -> None:
        self.recurrent_states: dict[int, Tensor | None] = {0: None}
        self.has_previous_state = {0: False}

    @property
    def state(self) -> Tensor | None:
        return self.recurrent_states[0]

    def update_recurrent_state(self, state: Tensor) -> None:
        if self.state is None:
            self.recurrent_states[0] = state.clone()
        elif self.state is not state:  # a kernel may have updated it where it lies
            self.state.copy_(state)

    def tensors(self) -> list[Tensor]:
        return [] if self.state is None else [self.state]


class Reused:
    """A cross-decoder layer: it has no cache of its own."""

    def tensors(self) -> list[Tensor]:
        return []


class BlockCache:
    """The cache of one batch.

    Args:
        config: of a YOCO or another decoder of transformers'.
        max_length: tokens that may ever be held.
        capacity: tokens of a block, a multiple of 64.
        reserve: allocate each global K,V whole, for max_length tokens, instead of growing it. Only then may several
            queries look back at earlier pieces, as a Transformer's prefill does.
    """

    def __init__(self, config: Any, max_length: int, capacity: int = 4096, reserve: bool = False) -> None:
        if capacity % TILE:
            raise ValueError(f"a block of {capacity} tokens is not a multiple of {TILE}")
        self.capacity, self.max_blocks = capacity, -(-max_length // capacity)
        self.reserve = self.max_blocks * capacity if reserve else None
        self.length, self.decoding = 0, False
        self.position: Tensor | None = None
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        modes = getattr(config, "kv_sharing_modes", None) or [None] * len(kinds)
        self.layers = [Reused() if mode == "reuse" else self._layer(kind, config) for kind, mode in zip(kinds, modes)]

    def _layer(self, kind: str, config: Any) -> Any:
        if kind == "linear_attention":
            return RetentionState()
        return WindowKV(self, config.sliding_window) if kind == "sliding_attention" else GlobalKV(self)

    # -- what models ask of it

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[KVLayer, KVLayer]:
        return self.layers[layer_idx].update(k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    # -- what the engine does with it

    def advance(self, tokens: int) -> None:
        """After a piece of the prompt has passed all layers."""
        self.length += tokens

    def start_decoding(self, device: torch.device) -> None:
        """From now on a call is one token, at a position that the device knows."""
        self.decoding = True
        self.position = torch.tensor([self.length], device=device)
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.new = None

    def make_room(self) -> None:
        """Room for one more token."""
        for layer in self.layers:
            if isinstance(layer, GlobalKV):
                layer.grow(self.length + 1)

    def table(self, anchor: Tensor, keys: Tensor, values: Tensor, *strides: int, capacity: int | None = None):
        """A BlockTable, where there is a kernel to read it."""
        return BlockTable(anchor, keys, values, capacity or self.capacity, *strides) if anchor.is_cuda else None

    def attend_one(self, q: Tensor, table: Any, length: Tensor, scaling: float, whole: Any) -> Tensor:
        """q [b, H, 1, D] over the first `length` tokens: by the kernel, on a CPU by torch over `whole(length)`."""
        if table is None:
            k, v = whole(int(length))
            return F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
        groups = table.batch_stride // table.head_stride
        splits = splits_for(q.shape[0], groups, q.device)
        return decode_attention(q[:, :, 0], table, length, groups, scaling, splits).unsqueeze(2)

    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in self.layers
            for t in layer.tensors()
        }
        return sum(held.values())


def causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attention of the last s of n tokens, q [b, H, s, D], to k, v [b, G, n, D]; `window` counts the query's own."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # torch's FlashAttention itself: aligned to the last key, with windows and grouped heads.
        left = None if window is None else window - 1
        out = torch.ops.aten._flash_attention_forward(
            *(t.transpose(1, 2) for t in (q, k, v)),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            True,
            False,
            scale=scaling,
            window_size_left=left,
            window_size_right=None if window is None else 0,
        )[0]
        return out.transpose(1, 2)
    n, s = k.shape[2], q.shape[2]
    distance = torch.arange(n - s, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    seen = (distance >= 0) & (distance < (window or n))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
