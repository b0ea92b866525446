"""The shared K,V as the layers of one stage read them, and their gradient, summed over all readers in one fp32 buffer.

Autograd would add the bf16 gradients of the cross-decoder layers pair by pair, out of place, rounding each time, and
would hand every layer's sum on to the next. Here each reader's backward adds into the buffer, and the K,V's own
backward takes it once. Rounding happens once, and nothing is copied per layer.

With context parallelism the layers read the K,V of the whole sequence, gathered once, and the buffer is as long; one
reduce-scatter gives each rank the gradient of its part. What goes on to the next stage is this rank's part alone.
"""

import torch
from torch import Tensor

from yoco_megatron.model.layers.recompute import KeptAttention
from yoco_megatron.parallel.context.kv_gather import gather_chunks, reduce_scatter_chunks
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class SharedKVReader:
    """The shared K,V of one micro-batch [s, b, G, 2, D], as the layers of one stage read them.

    Use: `hidden, reader = SharedKVReader.enter(hidden, kv, dtype, shard)`, then `reader.read()` in every layer and
    `reader.read_packed()` to send them on. Layers that run inside a checkpoint get `reader.inside_checkpoint()`.
    `kept` is where they keep their attention's output, if they do.
    """

    def __init__(
        self,
        kv: Tensor,
        whole: Tensor,
        gradient: "_Gradient",
        of_whole: "_Gradient",
        kept: KeptAttention | None = None,
    ) -> None:
        self.kv, self.whole, self._gradient, self._of_whole, self.kept = kv, whole, gradient, of_whole, kept

    @staticmethod
    def enter(
        hidden_states: Tensor, kv: Tensor, dtype: torch.dtype, gather: SequenceShard | None = None
    ) -> tuple[Tensor, "SharedKVReader"]:
        """Tie the K,V's gradient to the hidden states that all reading layers work on.

        The gradient of these hidden states is complete only after every reader's backward, so that the buffer is, too.

        Args:
            dtype: in which the K,V are read. They may come in fp32, from a boundary that carries fp32, and then get
                their gradient in fp32.
            gather: gather the K,V of all context-parallel ranks for the layers; None where the layers read these K,V.
        """
        gradient = _Gradient()
        of_whole = _Gradient(gather) if gather else gradient
        hidden_states, kv, whole = _Enter.apply(hidden_states, kv, dtype, gradient, of_whole)
        return hidden_states, SharedKVReader(kv, whole, gradient, of_whole)

    def inside_checkpoint(self, kept: KeptAttention | None = None) -> "SharedKVReader":
        """For functions that are run again in backward, in a graph of their own, which must not reach beyond them."""
        kv, whole = (t.detach().requires_grad_(t.requires_grad) for t in (self.kv, self.whole))
        return SharedKVReader(kv, whole, self._gradient, self._of_whole, kept)

    def read(self, first: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of positions first..stop-1 of the sequence, [stop - first, b, G, D]: views, not copies."""
        return _Read.apply(self.whole, self._of_whole, first, stop)

    def read_own(self) -> tuple[Tensor, Tensor]:
        """This rank's own keys and values [s, b, G, D] of gathered ones; their gradient goes where the others' goes."""
        return _ReadOwn.apply(self.kv, self.whole.shape, self._of_whole)

    def read_packed(self, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's keys and values [s, b, G, 2, D], in `dtype` if given; so is then their gradient."""
        return _ReadPacked.apply(self.kv, self._gradient, dtype or self.kv.dtype)


class _Gradient:
    """The buffer: fp32 (or wider), made when the first gradient comes, gone when it is taken.

    Over gathered K,V its rows lie as the ranks hold them, which is how they are scattered.
    """

    def __init__(self, gathered: SequenceShard | None = None) -> None:
        self.gathered = gathered
        self._buffer: Tensor | None = None

    def buffer(self, kv_shape: torch.Size, like: Tensor) -> Tensor:
        """The buffer, for a gradient like `like` to be added to."""
        if self._buffer is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._buffer = torch.zeros(kv_shape, dtype=dtype, device=like.device)
        return self._buffer

    def add(self, kv_shape: torch.Size, first: int, keys: Tensor, values: Tensor) -> None:
        """Add the gradient of the keys and values of positions first, first + 1, ..."""
        buffer = self.buffer(kv_shape, keys)
        spans = self.gathered.spans(first, first + len(keys)) if self.gathered else [(first, 0, len(keys))]
        for row, offset, rows in spans:
            part = buffer.narrow(0, row, rows)
            part[..., 0, :].add_(keys.narrow(0, offset, rows))
            part[..., 1, :].add_(values.narrow(0, offset, rows))

    def add_own(self, kv_shape: torch.Size, keys: Tensor, values: Tensor) -> None:
        """Add the gradient of the keys and values that this rank holds, which lie together here."""
        part = self.buffer(kv_shape, keys).narrow(0, self.gathered.rank * len(keys), len(keys))
        part[..., 0, :].add_(keys)
        part[..., 1, :].add_(values)

    def take(self) -> Tensor | None:
        buffer, self._buffer = self._buffer, None
        return buffer


class _Enter(torch.autograd.Function):
    """(hidden, K,V) pass; backward takes the buffer. Readers return no gradient of their own, but autograd counts them,
    and so runs this after all of them."""

    @staticmethod
    def forward(ctx, hidden_states, kv, dtype, gradient, of_whole):
        ctx.gradient, ctx.of_whole = gradient, of_whole
        ctx.set_materialize_grads(False)
        kv = kv.view_as(kv).to(dtype)
        whole = gather_chunks(kv, of_whole.gathered) if of_whole.gathered else kv.view_as(kv)
        ctx.whole = whole.shape, whole.new_empty(0)
        return hidden_states.view_as(hidden_states), kv, whole

    @staticmethod
    def backward(ctx, hidden_gradient, *_):
        gradient = ctx.gradient.take()
        if ctx.of_whole.gathered:
            ctx.of_whole.buffer(*ctx.whole)  # every rank joins, also one whose layers read nothing
            gathered = reduce_scatter_chunks(ctx.of_whole.take(), ctx.of_whole.gathered)
            gradient = gathered if gradient is None else gathered.add_(gradient)
        return hidden_gradient, gradient, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gradient, first, stop):
        ctx.gradient, ctx.shape, ctx.first = gradient, kv.shape, first
        return kv[first:stop, ..., 0, :], kv[first:stop, ..., 1, :]

    @staticmethod
    def backward(ctx, keys, values):
        ctx.gradient.add(ctx.shape, ctx.first, keys, values)
        return None, None, None, None


class _ReadOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, whole_shape, of_whole):
        ctx.of_whole, ctx.whole_shape = of_whole, whole_shape
        return kv[..., 0, :], kv[..., 1, :]

    @staticmethod
    def backward(ctx, keys, values):
        ctx.of_whole.add_own(ctx.whole_shape, keys, values)
        return None, None, None


class _ReadPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gradient, dtype):
        ctx.gradient, ctx.shape = gradient, kv.shape
        return kv.view_as(kv).to(dtype)

    @staticmethod
    def backward(ctx, value):
        ctx.gradient.buffer(ctx.shape, value).add_(value)
        return None, None, None
