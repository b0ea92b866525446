"""The caches of a decoding engine, in transformers' interface: `model(..., past_key_values=BlockCache(...))`.

* a global K,V grows by blocks that are never moved (or is one region, reserved at the start);
* a window is a ring buffer: token p is in slot p mod W, and nothing moves when the window slides;
* a retention state is one fp32 tensor, updated in place.

A layer's `update` returns the layer itself, and the attention implementation below passes the queries to it. So the
model's own code runs, and so does any other decoder in transformers, such as the baseline Transformer.

Prompts come in chunks, of the same length in every row. The position of a decoding step is stored on the device, so
that the step can be a CUDA graph (engine.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from yoco_megatron.ops.attention.decode import TILE, BlockTable, append, decode_attention, offset_of, splits_for
from yoco_megatron.ops.attention.quantized import pack, unpack

IMPLEMENTATION = "yoco_blocks"


def attend(module: Any, query: Tensor, key: "KVLayer", value: Any, mask: None, scaling: float, **_: Any) -> tuple:
    """transformers' attention interface: query [b, H, s, D] -> ([b, s, H, D], None)."""
    return key.attend(query, scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend)


class KVLayer(ABC):
    """Base of both kinds of K,V: a table of blocks that a decoding step reads and writes by position."""

    def __init__(self, cache: "BlockCache") -> None:
        self.cache = cache
        self.new: tuple[Tensor, ...] = ()
        self.table: Any = None

    @abstractmethod
    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Allocate what the K,V [b, G, s, D] of new tokens need."""

    @abstractmethod
    def store(self, k: Tensor, v: Tensor) -> None:
        """Copy the K,V [b, G, s, D] of a prompt chunk into the cache."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the K,V [b, G, s, D] of a decoding step, at the latest when it attends."""

    @abstractmethod
    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Attention of the last n tokens, q [b, H, n, D] -> [b, H, n, D]."""

    def update(self, k: Tensor, v: Tensor) -> tuple["KVLayer", "KVLayer"]:
        """Store the K,V [b, G, s, D] of new tokens; returns (self, self) in place of K,V."""
        self.prepare(k, v)
        self.new = (k, v)
        if self.cache.decoding:
            self.append(k, v)
        else:
            self.store(k, v)
        return self, self


class GlobalKV(KVLayer):
    """All tokens' K,V in blocks of `capacity` tokens [b, G, capacity, D]; causal attention to all of them.

    With a `kv_cache_dtype` they are bytes, and D is their width.
    """

    def __init__(self, cache: "BlockCache") -> None:
        super().__init__(cache)
        self.blocks: list[tuple[Tensor, ...]] = []

    def update(self, k: Tensor, v: Tensor) -> tuple["KVLayer", "KVLayer"]:
        """As `KVLayer.update`."""
        self.dtype = k.dtype
        if kind := self.cache.kv_cache_dtype:
            k, v = pack(k, kind), pack(v, kind)
        return super().update(k, v)

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Allocate the block table on the first call; before decoding, also blocks for the new tokens."""
        if self.table is None:
            self.shape = (k.shape[0], k.shape[1], k.shape[3])
            self.offsets = torch.zeros(2, self.cache.max_blocks, dtype=torch.int64, device=k.device)
            # Whatever allocation that lives as long as the cache.
            self.base = k.new_empty(64)
            kind = self.cache.kv_cache_dtype
            keys, values = self.offsets
            self.table = self.cache.table(self.base, keys, values, self.strides(), kind=kind)
        if not self.cache.decoding:
            self.grow(self.cache.length + k.shape[2])

    def strides(self) -> tuple[int, int]:
        """Strides of sequences and of heads, in elements."""
        _, groups, width = self.shape
        tokens = self.cache.reserve or self.cache.capacity
        return groups * tokens * width, tokens * width

    def grow(self, length: int) -> None:
        """Allocate blocks for `length` tokens; existing ones stay. Raises ValueError beyond a reserved region."""
        batch, groups, width = self.shape
        capacity, reserve = self.cache.capacity, self.cache.reserve
        if reserve and not self.blocks:
            whole = tuple(self.base.new_empty(batch, groups, reserve, width) for _ in range(2))
            self.blocks = [
                tuple(t[:, :, at : at + capacity] for t in whole) for at in range(0, reserve, capacity)
            ]  # views into one region
            self._register(0)
        while len(self.blocks) * capacity < length:
            if reserve:
                raise ValueError(f"the cache was reserved for {reserve} tokens, {length} are needed")
            self.blocks.append(tuple(self.base.new_empty(batch, groups, capacity, width) for _ in range(2)))
            self._register(len(self.blocks) - 1)

    def _register(self, first: int) -> None:
        """Write the offsets of the blocks from `first` on into the table."""
        new = torch.tensor([[offset_of(block[i], self.base) for block in self.blocks[first:]] for i in (0, 1)])
        self.offsets[:, first : len(self.blocks)] = new.to(self.offsets.device)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Copy K,V [b, G, s, D] of a chunk of the prompt into the blocks."""
        start, capacity = self.cache.length, self.cache.capacity
        done = 0
        while done < k.shape[2]:
            number, at = divmod(start + done, capacity)
            count = min(capacity - at, k.shape[2] - done)
            for block, new in zip(self.blocks[number], (k, v)):
                block[:, :, at : at + count] = new[:, :, done : done + count]
            done += count

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write K,V [b, G, s, D] of a decoding step from the cache's position on."""
        for i in range(k.shape[2]):
            position = self.cache.position_of(i)
            if k.is_cuda:
                append(k[:, :, i], v[:, :, i], self.table, position)
            else:
                number, at = divmod(int(position), self.cache.capacity)
                for block, new in zip(self.blocks[number], (k, v)):
                    block[:, :, at] = new[:, :, i]

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Causal attention of the last n tokens, q [b, H, n, D] -> [b, H, n, D]."""
        if self.cache.decoding:
            after_first = self.cache.position + self.new[0].shape[2] - q.shape[2] + 1
            return one_by_one(q, lambda i, one: self.first(after_first + i).attend(one, scaling))
        end = self.cache.length + self.new[0].shape[2]
        if q.shape[2] == 1:  # the last token: no mask is needed
            length = torch.tensor([end], device=q.device)
            return self.cache.attend_one(q, self.table, length, scaling, self._whole)
        k, v = self._read(self.new) if self.cache.length == 0 else self._whole(end)
        return causal(q, k, v, scaling, None)

    def first(self, length: Tensor) -> "FirstTokens":
        """The first tokens, as many as `length` (int64 [1] on the device) says, for one query."""
        return FirstTokens(self, length)

    def _whole(self, end: int) -> tuple[Tensor, ...]:
        """K and V of the first `end` tokens: views of a reserved region, else copies of the blocks."""
        if self.cache.reserve:
            first = self.blocks[0]
            shape = (*first[0].shape[:2], end, first[0].shape[3])
            return self._read(tuple(torch.as_strided(t, shape, t.stride(), t.storage_offset()) for t in first))
        return self._read(tuple(torch.cat([block[i] for block in self.blocks], dim=2)[:, :, :end] for i in (0, 1)))

    def _read(self, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As the model has them, of what the cache holds."""
        kind = self.cache.kv_cache_dtype
        return tuple(unpack(t, kind, self.dtype) for t in held) if kind else held

    def tensors(self) -> list[Tensor]:
        """All K and V blocks."""
        return [t for block in self.blocks for t in block]


class FirstTokens:
    """Some of the first tokens' K,V, which one query attends to."""

    def __init__(self, kv: GlobalKV, length: Tensor) -> None:
        self.kv, self.length = kv, length

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Attention of q [b, H, 1, D] to all of them."""
        return self.kv.cache.attend_one(q, self.kv.table, self.length, scaling, self.kv._whole)


class WindowKV(KVLayer):
    """The last W tokens' K,V in a ring buffer [b, G, W, D]."""

    def __init__(self, cache: "BlockCache", window: int) -> None:
        super().__init__(cache)
        self.window = window
        self.ring: tuple[Tensor, ...] = ()
        self.visible: tuple[Tensor, ...] = ()

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Allocate the ring on the first call; its size is rounded up to the kernel's tile."""
        if not self.ring:
            capacity = -(-self.window // TILE) * TILE
            shape = (k.shape[0], k.shape[1], capacity, k.shape[3])
            self.ring = (k.new_zeros(shape), k.new_zeros(shape))
            keys, values = (torch.tensor([offset_of(t, self.ring[0])], device=k.device) for t in self.ring)
            strides = (shape[1] * capacity * shape[3], capacity * shape[3])
            self.table = self.cache.table(self.ring[0], keys, values, strides, capacity)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep the chunk's K,V with the window before it for `attend`; copy the last W tokens into the ring."""
        start, length = self.cache.length, k.shape[2]
        before = torch.arange(max(0, start - self.window + 1), start, device=k.device) % self.window
        self.visible = tuple(torch.cat((t[:, :, before], new), dim=2) for t, new in zip(self.ring, (k, v)))
        window_rows = torch.arange(max(start, start + length - self.window), start + length, device=k.device)
        for t, new in zip(self.ring, (k, v)):
            t[:, :, window_rows % self.window] = new[:, :, window_rows - start]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Nothing yet: a token takes the slot of one that the queries before it see."""

    def attend(self, q: Tensor, scaling: float) -> Tensor:
        """Window attention of the last n tokens, q [b, H, n, D] -> [b, H, n, D]."""
        if self.cache.decoding:
            return one_by_one(q, lambda i, one: self._attend_next(i, one, scaling))
        (k, v), self.visible = self.visible, ()
        return causal(q, k, v, scaling, self.window)

    def _attend_next(self, i: int, q: Tensor, scaling: float) -> Tensor:
        """Write the K,V of token i of a decoding step into their slot; window attention of its q [b, H, 1, D]."""
        position = self.cache.position_of(i)
        for t, new in zip(self.ring, self.new):
            t.index_copy_(2, position % self.window, new[:, :, i : i + 1])
        length = (position + 1).clamp(max=self.window)
        return self.cache.attend_one(q, self.table, length, scaling, lambda end: [t[:, :, :end] for t in self.ring])

    def tensors(self) -> list[Tensor]:
        """K and V of the ring."""
        return list(self.ring)


class RetentionState:
    """The recurrent state of a layer, one fp32 tensor, and the last inputs of its convolution, if it has one; with the
    attributes of transformers' cache layers."""

    def __init__(self) -> None:
        self.recurrent_states: dict[int, Tensor | None] = {0: None}
        self.conv_states: dict[int, Tensor | None] = {0: None}
        self.has_previous_state = {0: False}

    @property
    def state(self) -> Tensor | None:
        """The state, or None before the first tokens."""
        return self.recurrent_states[0]

    def update_recurrent_state(self, state: Tensor) -> None:
        """Copy `state` into the one tensor, so that its address never changes."""
        if self.state is None:
            self.recurrent_states[0] = state.clone()
        elif self.state is not state:  # else a kernel updated it in place
            self.state.copy_(state)

    def update_conv_state(self, x: Tensor, conv_kernel_size: int) -> Tensor:
        """x [b, C, s] behind the inputs before it [b, C, conv_kernel_size], zeros at first; keeps the last ones, at one
        address."""
        held = self.conv_states[0]
        if held is None:
            held = self.conv_states[0] = x.new_zeros(*x.shape[:2], conv_kernel_size)
        seen = torch.cat((held, x), dim=-1)
        held.copy_(seen[..., -conv_kernel_size:])
        return seen

    def tensors(self) -> list[Tensor]:
        """The states, if any."""
        return [state for state in (self.state, self.conv_states[0]) if state is not None]


class SharedKVSlot:
    """The slot of a cross-decoder layer, which has no cache of its own: it reads the shared K,V."""

    def tensors(self) -> list[Tensor]:
        """[]: it holds nothing."""
        return []


class BlockCache:
    """The cache of one batch.

    Args:
        config: of a YOCO or another transformers decoder.
        max_length: most tokens per sequence.
        capacity: tokens per block, a multiple of 64.
        kv_cache_dtype: of `ops.attention.quantized.FORMATS`, for global K,V; None for the model's own dtype.
        reserve: allocate each global K,V for max_length tokens at once, instead of growing it. Without it, a prompt
            chunk that attends to earlier ones, as in a Transformer's prefill, copies all blocks.
    Raises:
        ValueError: a capacity that is not a multiple of 64.
    """

    position: Tensor
    """int64 [1], of the token that a decoding step takes; from `start_decoding` on."""

    def __init__(
        self,
        config: Any,
        max_length: int,
        capacity: int = 4096,
        reserve: bool = False,
        kv_cache_dtype: str | None = None,
    ) -> None:
        if capacity % TILE:
            raise ValueError(f"a block of {capacity} tokens is not a multiple of {TILE}")
        self.capacity, self.max_blocks = capacity, -(-max_length // capacity)
        self.reserve = self.max_blocks * capacity if reserve else None
        self.kv_cache_dtype = kv_cache_dtype
        self.length, self.decoding = 0, False
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        modes = getattr(config, "kv_sharing_modes", None) or [None] * len(kinds)
        self.layers: list[Any] = [
            SharedKVSlot() if mode == "reuse" else self._layer(kind, config) for kind, mode in zip(kinds, modes)
        ]

    def _layer(self, kind: str, config: Any) -> Any:
        if kind == "linear_attention":
            return RetentionState()
        if kind == "sliding_attention":
            return WindowKV(self, config.sliding_window)
        if kind == "full_attention":
            return GlobalKV(self)
        raise ValueError(f"layer_types: {kind} is unknown to the engine")

    # -- the interface that models call

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[KVLayer, KVLayer]:
        """Store the K,V [b, G, s, D] of new tokens in a layer; returns that layer in place of K and V."""
        return self.layers[layer_idx].update(k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that all layers hold."""
        return self.length

    # -- the interface that the engine calls

    def advance(self, tokens: int) -> None:
        """Count the tokens of a prompt chunk that has passed all layers."""
        self.length += tokens

    def start_decoding(self, device: torch.device) -> None:
        """Switch to decoding: each call is a token or a few, from a position on that is stored on the device."""
        self.decoding = True
        self.position = torch.tensor([self.length], device=device)
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.new = ()

    def make_room(self, tokens: int = 1) -> None:
        """Allocate room for so many more tokens."""
        for layer in self.layers:
            if isinstance(layer, GlobalKV):
                layer.grow(self.length + tokens)

    def position_of(self, i: int) -> Tensor:
        """int64 [1], of token i of a decoding step."""
        return self.position + i if i else self.position

    def table(
        self,
        base: Tensor,
        keys: Tensor,
        values: Tensor,
        strides: tuple[int, int],
        capacity: int | None = None,
        kind: str | None = None,
    ) -> BlockTable | None:
        """A BlockTable, where there is a kernel to read it."""
        return BlockTable(base, keys, values, capacity or self.capacity, *strides, kind) if base.is_cuda else None

    def attend_one(self, q: Tensor, table: Any, length: Tensor, scaling: float, whole: Any) -> Tensor:
        """Attention of q [b, H, 1, D] to the first `length` tokens; on a CPU by torch, over `whole(length)`."""
        if table is None:
            k, v = whole(int(length))
            return F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
        groups = table.batch_stride // table.head_stride
        splits = splits_for(q.shape[0], groups, q.device)
        return decode_attention(q[:, :, 0], table, length, groups, scaling, splits).unsqueeze(2)

    def nbytes(self) -> int:
        """Bytes of all tensors in the cache."""
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in self.layers
            for t in layer.tensors()
        }
        return sum(held.values())


def one_by_one(q: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
    """attend(i, query i) of each query of q [b, H, n, D], in order."""
    parts = [attend(i, one) for i, one in enumerate(q.split(1, dim=2))]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attention of the last s of n tokens, q [b, H, s, D], to k, v [b, G, n, D]; `window` counts the query's own."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # torch's FlashAttention, called directly: bottom-right causal, with windows and grouped heads.
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
    visible = (distance >= 0) & (distance < (window or n))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling, enable_gqa=True)
