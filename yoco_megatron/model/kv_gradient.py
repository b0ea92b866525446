"""The gradient of the shared K,V: summed over all readers of a stage in one fp32 buffer.

Autograd would add the bf16 gradients of the cross-decoder layers pair by pair, out of place, rounding each time, and
would hand every layer's sum on to the next. Here each reader's backward adds into the buffer, and the K,V's own
backward takes it once. Rounding happens once, and nothing is copied per layer.
"""

import torch
from torch import Tensor


class SharedKVReader:
    """The shared K,V of one micro-batch [s, b, G, 2, D], as the layers of one stage read them.

    Use: `hidden, reader = SharedKVReader.enter(hidden, kv, dtype)`, then `reader.read()` in every layer and
    `reader.read_packed()` to send them on. Layers that run inside a checkpoint get `reader.inside_checkpoint()`.
    """

    def __init__(self, kv: Tensor, gradient: "_Gradient") -> None:
        self.kv, self._gradient = kv, gradient

    @staticmethod
    def enter(hidden_states: Tensor, kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, "SharedKVReader"]:
        """Tie the K,V's gradient to the hidden states that all reading layers work on.

        The gradient of these hidden states is complete only after every reader's backward, so that the buffer is, too.

        Args:
            dtype: in which the K,V are read. They may come in fp32, from a boundary that carries fp32, and then get
                their gradient in fp32.
        """
        gradient = _Gradient()
        hidden_states, kv = _Enter.apply(hidden_states, kv, dtype, gradient)
        return hidden_states, SharedKVReader(kv, gradient)

    def inside_checkpoint(self) -> "SharedKVReader":
        """For functions that are run again in backward, in a graph of their own, which must not reach beyond them."""
        return SharedKVReader(self.kv.detach().requires_grad_(self.kv.requires_grad), self._gradient)

    def read(self, first: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of positions first..stop-1, [stop - first, b, G, D] each: views, not copies."""
        return _Read.apply(self.kv, self._gradient, slice(first, stop))

    def read_packed(self, dtype: torch.dtype | None = None) -> Tensor:
        """Both together [s, b, G, 2, D], in `dtype` if given; the gradient is then taken in that dtype as well."""
        return _ReadPacked.apply(self.kv, self._gradient, dtype or self.kv.dtype)


def _keys(kv: Tensor) -> Tensor:
    return kv[..., 0, :]


def _values(kv: Tensor) -> Tensor:
    return kv[..., 1, :]


class _Gradient:
    """The buffer: fp32 (or wider), made when the first gradient comes, gone when it is taken."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def of(self, kv_shape: torch.Size, like: Tensor) -> Tensor:
        """The buffer, for a gradient like `like` to be added to."""
        if self.buffer is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.buffer = torch.zeros(kv_shape, dtype=dtype, device=like.device)
        return self.buffer

    def take(self) -> Tensor | None:
        buffer, self.buffer = self.buffer, None
        return buffer


class _Enter(torch.autograd.Function):
    """(hidden, K,V) pass; backward takes the buffer. Readers return no gradient of their own, but autograd counts them,
    and so runs this after all of them."""

    @staticmethod
    def forward(ctx, hidden_states, kv, dtype, gradient):
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return hidden_states.view_as(hidden_states), kv.view_as(kv).to(dtype)

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient, ctx.gradient.take(), None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gradient, rows):
        ctx.gradient, ctx.shape, ctx.rows = gradient, kv.shape, rows
        return _keys(kv[rows]), _values(kv[rows])

    @staticmethod
    def backward(ctx, keys, values):
        buffer = ctx.gradient.of(ctx.shape, keys)[ctx.rows]
        _keys(buffer).add_(keys)
        _values(buffer).add_(values)
        return None, None, None


class _ReadPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, gradient, dtype):
        ctx.gradient, ctx.shape = gradient, kv.shape
        return kv.view_as(kv).to(dtype)

    @staticmethod
    def backward(ctx, value):
        ctx.gradient.of(ctx.shape, value).add_(value)
        return None, None, None
