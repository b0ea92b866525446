"""The shared K,V as the layers of one stage read them, and their gradient, summed over all readers in one fp32 buffer.

Autograd would add the bf16 gradients of the cross-decoder layers pair by pair, out of place, rounding each time, and
would pass every layer's sum on to the next. Here each reader's backward adds into the buffer, and the backward of the
K,V takes it once: one rounding, and no copy per layer.

With context parallelism the layers read the K,V of the whole sequence, gathered once, and the buffer is as long; one
reduce-scatter gives each rank the gradient of its part. Only this rank's part goes to the next stage.

With packed documents the layers read K,V that are laid out for their calls (`DocumentCalls`), each with its own buffer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_megatron.model.layers.recompute import AttentionOutputStore
from yoco_megatron.parallel.context.document_calls import DocumentCalls
from yoco_megatron.parallel.context.kv_gather import gather_chunks, reduce_scatter_chunks
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class SharedKVReader:
    """The shared K,V of one micro-batch [s, b, G, 2, D], as the layers of one stage read them.

    Use: `hidden, reader = SharedKVReader.enter(hidden, kv, dtype, shard)`, then `reader.read()` in every layer and
    `reader.read_stacked()` to send them to the next stage. Layers inside a checkpoint get `reader.inside_checkpoint()`.

    Attributes:
        kv: this rank's K,V.
        documents: the calls over packed documents; None if the layers read the sequence.
        attention_outputs: where the layers store their attention outputs; None if they do not.
    """

    def __init__(
        self,
        kv: Tensor,
        grad: "KVGradBuffer",
        parts: "list[tuple[Tensor, KVGradBuffer]]",
        documents: DocumentCalls | None = None,
        attention_outputs: AttentionOutputStore | None = None,
    ) -> None:
        self.kv, self._grad, self._parts = kv, grad, parts
        self.documents, self.attention_outputs = documents, attention_outputs

    @staticmethod
    def enter(
        hidden_states: Tensor,
        kv: Tensor,
        dtype: torch.dtype,
        gather: SequenceShard | None = None,
        documents: DocumentCalls | None = None,
    ) -> tuple[Tensor, "SharedKVReader"]:
        """Tie the gradient of the K,V to the hidden states that all reading layers work on.

        The gradient of these hidden states is complete only after every reader's backward, and so is the buffer then.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] with sequence parallelism).
            kv: [s, b, G, 2, D] of this rank.
            dtype: in which the K,V are read. They may arrive in fp32, from a boundary that carries fp32, and then get
                their gradient in fp32.
            gather: gather the K,V of all context-parallel ranks for the layers; None if the layers read `kv` itself.
            documents: lay out the K,V for these calls instead.
        """
        grad = KVGradBuffer()
        in_place = [gather is None] if documents is None else documents.in_place
        grads = [grad if is_own else KVGradBuffer(gather) for is_own in in_place]
        hidden_states, kv, *copies = _AttachReaders.apply(hidden_states, kv, dtype, grad, grads, gather, documents)
        others = iter(copies)
        parts = [(kv if is_own else next(others), of_part) for is_own, of_part in zip(in_place, grads)]
        return hidden_states, SharedKVReader(kv, grad, parts, documents)

    def inside_checkpoint(self, attention_outputs: AttentionOutputStore | None = None) -> "SharedKVReader":
        """A reader for functions that run again in backward, in a graph of their own that must end at the K,V."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(x.requires_grad)

        parts = [(leaf(kv), grad) for kv, grad in self._parts]
        return SharedKVReader(leaf(self.kv), self._grad, parts, self.documents, attention_outputs)

    def read(self, first: int = 0, stop: int | None = None, part: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of positions first..stop-1 of the sequence, [stop - first, b, G, D]: views, not copies.

        With documents: rows of what was laid out as `part`, [stop - first, 1, G, D].
        """
        kv, grad = self._parts[part]
        return _Read.apply(kv, grad, first, stop)

    def read_own(self) -> tuple[Tensor, Tensor]:
        """This rank's own keys and values [s, b, G, D]; their gradient joins that of the gathered ones."""
        (gathered_kv, gathered_grad), *_ = self._parts
        return _ReadOwn.apply(self.kv, gathered_kv.shape, gathered_grad)

    def read_stacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's K,V [s, b, G, 2, D] as one tensor, in `dtype` if given; their gradient then has it, too."""
        return _ReadStacked.apply(self.kv, self._grad, dtype or self.kv.dtype)


@dataclass
class SharedReaders:
    """What the layers of a cross-decoder read: a set of the shared K,V, and the memory of gated memory units, which is
    read whole (`SharedKVReader.read_stacked`). None: these layers do not."""

    kv: SharedKVReader | None = None
    memory: SharedKVReader | None = None

    def inside_checkpoint(self, attention_outputs: AttentionOutputStore | None = None) -> "SharedReaders":
        """Of both."""
        kv, memory = self.kv, self.memory
        return SharedReaders(kv and kv.inside_checkpoint(attention_outputs), memory and memory.inside_checkpoint())


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
    """Pass on (hidden states, K,V, copies of them for the layers); backward takes the buffers. Readers return no
    gradient of their own, but autograd counts them, and so runs this backward after all of theirs."""

    @staticmethod
    def forward(ctx, hidden_states, kv, dtype, grad, grads, gather, documents):
        kv = kv.view_as(kv).to(dtype)
        copies = [gather_chunks(kv, gather)] if gather else []
        if documents is not None:
            copies = documents.lay_out(kv)
        ctx.grad, ctx.of_copies = grad, [of_copy for of_copy in grads if of_copy is not grad]
        ctx.gather, ctx.documents = gather, documents
        ctx.shapes, ctx.like = [copy.shape for copy in copies], kv.new_empty(0)
        ctx.set_materialize_grads(False)
        return hidden_states.view_as(hidden_states), kv, *copies

    @staticmethod
    def backward(ctx, hidden_gradient, *_):
        for of_copy, shape in zip(ctx.of_copies, ctx.shapes):
            of_copy.buffer(shape, ctx.like)  # every rank joins, even one whose layers read nothing
        gradients = [of_copy.take() for of_copy in ctx.of_copies]
        of_layers = None
        if ctx.documents is not None:
            of_layers = ctx.documents.put_back(gradients)
        elif ctx.gather:
            of_layers = reduce_scatter_chunks(gradients[0], ctx.gather)
        gradient = ctx.grad.take()
        if of_layers is not None:
            gradient = of_layers if gradient is None else of_layers.add_(gradient)
        return hidden_gradient, gradient, None, None, None, None, None


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
