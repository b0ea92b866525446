"""The shared K,V as the layers of one stage read them, and their gradient, summed over all readers in one fp32 buffer.

Autograd would add the bf16 gradients of the cross-decoder layers pair by pair, out of place, rounding each time, and
would pass every layer's sum on to the next. Here each reader's backward adds into the buffer, and the backward of the
K,V takes it once: one rounding, and no copy per layer.

With context parallelism the layers read the K,V of the whole sequence, gathered once, and the buffer is as long; one
reduce-scatter gives each rank the gradient of its part. Only this rank's part goes to the next stage.
"""

import torch
from torch import Tensor

from yoco_megatron.model.layers.recompute import AttentionOutputStore
from yoco_megatron.parallel.context.kv_gather import gather_chunks, reduce_scatter_chunks
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class SharedKVReader:
    """The shared K,V of one micro-batch [s, b, G, 2, D], as the layers of one stage read them.

    Use: `hidden, reader = SharedKVReader.enter(hidden, kv, dtype, shard)`, then `reader.read()` in every layer and
    `reader.read_stacked()` to send them to the next stage. Layers inside a checkpoint get `reader.inside_checkpoint()`.

    Attributes:
        kv: this rank's K,V.
        gathered_kv: those of the whole sequence with context parallelism, else the same.
        attention_outputs: where the layers store their attention outputs; None if they do not.
    """

    def __init__(
        self,
        kv: Tensor,
        gathered_kv: Tensor,
        grad: "KVGradBuffer",
        gathered_grad: "KVGradBuffer",
        attention_outputs: AttentionOutputStore | None = None,
    ) -> None:
        self.kv, self.gathered_kv, self._grad, self._gathered_grad = kv, gathered_kv, grad, gathered_grad
        self.attention_outputs = attention_outputs

    @staticmethod
    def enter(
        hidden_states: Tensor, kv: Tensor, dtype: torch.dtype, gather: SequenceShard | None = None
    ) -> tuple[Tensor, "SharedKVReader"]:
        """Tie the gradient of the K,V to the hidden states that all reading layers work on.

        The gradient of these hidden states is complete only after every reader's backward, and so is the buffer then.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] with sequence parallelism).
            kv: [s, b, G, 2, D] of this rank.
            dtype: in which the K,V are read. They may arrive in fp32, from a boundary that carries fp32, and then get
                their gradient in fp32.
            gather: gather the K,V of all context-parallel ranks for the layers; None if the layers read `kv` itself.
        """
        grad = KVGradBuffer()
        gathered_grad = KVGradBuffer(gather) if gather else grad
        hidden_states, kv, gathered_kv = _AttachReaders.apply(hidden_states, kv, dtype, grad, gathered_grad)
        return hidden_states, SharedKVReader(kv, gathered_kv, grad, gathered_grad)

    def inside_checkpoint(self, attention_outputs: AttentionOutputStore | None = None) -> "SharedKVReader":
        """A reader for functions that run again in backward, in a graph of their own that must end at the K,V."""
        kv, gathered_kv = (t.detach().requires_grad_(t.requires_grad) for t in (self.kv, self.gathered_kv))
        return SharedKVReader(kv, gathered_kv, self._grad, self._gathered_grad, attention_outputs)

    def read(self, first: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of positions first..stop-1 of the sequence, [stop - first, b, G, D]: views, not copies."""
        return _Read.apply(self.gathered_kv, self._gathered_grad, first, stop)

    def read_own(self) -> tuple[Tensor, Tensor]:
        """This rank's own keys and values [s, b, G, D]; their gradient joins that of the gathered ones."""
        return _ReadOwn.apply(self.kv, self.gathered_kv.shape, self._gathered_grad)

    def read_stacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's K,V [s, b, G, 2, D] as one tensor, in `dtype` if given; their gradient then has it, too."""
        return _ReadStacked.apply(self.kv, self._grad, dtype or self.kv.dtype)


class KVGradBuffer:
    """The gradient buffer [s, b, G, 2, D], fp32 or wider: allocated at the first add, released by `take()`.

    Over gathered K,V (`gathered`) its rows are in rank-major order, ready for the reduce-scatter.
    """

    def __init__(self, gathered: SequenceShard | None = None) -> None:
        self.gathered = gathered
        self._buffer: Tensor | None = None

    def buffer(self, kv_shape: torch.Size, like: Tensor) -> Tensor:
        """The buffer, allocated for gradients of the dtype and device of `like` if it does not exist."""
        if self._buffer is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._buffer = torch.zeros(kv_shape, dtype=dtype, device=like.device)
        return self._buffer

    def add(self, kv_shape: torch.Size, first: int, keys: Tensor, values: Tensor) -> None:
        """Add the gradient of the keys and values of positions first, first + 1, ..."""
        buffer = self.buffer(kv_shape, keys)
        spans = self.gathered.held_spans(first, first + len(keys)) if self.gathered else [(first, 0, len(keys))]
        for row, offset, rows in spans:
            part = buffer.narrow(0, row, rows)
            part[..., 0, :].add_(keys.narrow(0, offset, rows))
            part[..., 1, :].add_(values.narrow(0, offset, rows))

    def add_own(self, kv_shape: torch.Size, keys: Tensor, values: Tensor) -> None:
        """Add the gradient of the keys and values that this rank holds, which are neighbours in the buffer."""
        assert self.gathered is not None
        part = self.buffer(kv_shape, keys).narrow(0, self.gathered.rank * len(keys), len(keys))
        part[..., 0, :].add_(keys)
        part[..., 1, :].add_(values)

    def take(self) -> Tensor | None:
        """The sum, which is released here; None if nothing was added."""
        buffer, self._buffer = self._buffer, None
        return buffer


class _AttachReaders(torch.autograd.Function):
    """Pass on (hidden states, K,V); backward takes the buffer. Readers return no gradient of their own, but autograd
    counts them, and so runs this backward after all of theirs."""

    @staticmethod
    def forward(ctx, hidden_states, kv, dtype, grad, gathered_grad):
        ctx.grad, ctx.gathered_grad = grad, gathered_grad
        ctx.set_materialize_grads(False)
        kv = kv.view_as(kv).to(dtype)
        gathered_kv = gather_chunks(kv, gathered_grad.gathered) if gathered_grad.gathered else kv.view_as(kv)
        ctx.gathered_kv = gathered_kv.shape, gathered_kv.new_empty(0)
        return hidden_states.view_as(hidden_states), kv, gathered_kv

    @staticmethod
    def backward(ctx, hidden_gradient, *_):
        gradient = ctx.grad.take()
        if ctx.gathered_grad.gathered:
            ctx.gathered_grad.buffer(*ctx.gathered_kv)  # every rank joins, even one whose layers read nothing
            scattered = reduce_scatter_chunks(ctx.gathered_grad.take(), ctx.gathered_grad.gathered)
            gradient = scattered if gradient is None else scattered.add_(gradient)
        return hidden_gradient, gradient, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, grad, first, stop):
        ctx.grad, ctx.shape, ctx.first = grad, kv.shape, first
        return kv[first:stop, ..., 0, :], kv[first:stop, ..., 1, :]

    @staticmethod
    def backward(ctx, keys, values):
        ctx.grad.add(ctx.shape, ctx.first, keys, values)
        return None, None, None, None


class _ReadOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gathered_shape, gathered_grad):
        ctx.gathered_grad, ctx.gathered_shape = gathered_grad, gathered_shape
        return kv[..., 0, :], kv[..., 1, :]

    @staticmethod
    def backward(ctx, keys, values):
        ctx.gathered_grad.add_own(ctx.gathered_shape, keys, values)
        return None, None, None


class _ReadStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, grad, dtype):
        ctx.grad, ctx.shape = grad, kv.shape
        return kv.view_as(kv).to(dtype)

    @staticmethod
    def backward(ctx, value):
        ctx.grad.buffer(ctx.shape, value).add_(value)
        return None, None, None
