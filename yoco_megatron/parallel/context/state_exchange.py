"""Recurrent states over chunks of a sequence that lie on different context-parallel ranks.

What a chunk of tokens does to the state S that enters it is M S + w: of gated retention M is a factor for each head, of
the delta rule a matrix. Each rank computes both of its chunks, one small all-gather shares them, and each rank carries
the state through the chunks before its own. With e_c whether the document continues from chunk c - 1 into c,

    S_0 = 0 ,   S_{c+1} = e_{c+1} (M_c S_c + w_c)

The op then runs on each chunk with S_c as its initial state. Backward is the mirror image: with u_c what the outputs of
chunk c send to S_c, exchanged the same way, the gradient of the state after chunk c is

    G_{N-1} = 0 ,   G_{c-1} = e_c (M_c^T G_c + u_c)

which the op takes as that of its final state. Tensor legend: N chunks of the sequence, n chunks held here, b batch,
H heads, K key width, V value width.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class StateExchange:
    """The exchange of one layer and micro-batch. Made early, it runs while the caller prepares the op.

    Args:
        update: w [n b, H, K, V] of the chunks held here, which are in the batch dimension (`SequenceShard.fold`).
        transition: M, [n b, H] or [n b, H, K, K]. Both have no path for gradients.
    """

    def __init__(self, update: Tensor, transition: Tensor, shard: SequenceShard) -> None:
        self.shard = shard
        self._state = update.shape[1:]
        if transition.ndim == 2:
            transition = transition[..., None, None]
        self._transition = transition
        self._message, self._work = _start_gather(torch.cat((update.flatten(2), transition.flatten(2)), -1), shard)

    def initial_states(self) -> Tensor:
        """The states that enter the chunks held here, [n b, H, K, V], contiguous, without a path for gradients.

        `attach_final_state_grad` computes their gradients' part in backward.
        """
        self._work.wait()
        message = self.shard.to_sequence_order(self._message)
        del self._message  # what backward needs is small
        update, transition = message.split((self._state[1] * self._state[2], self._transition[0, 0].numel()), -1)
        self._transition = transition.unflatten(-1, self._transition.shape[2:]).clone(
            memory_format=torch.contiguous_format
        )
        return self._carry(update.unflatten(-1, self._state[1:]), range(self.shard.num_chunks))

    def attach_final_state_grad(
        self, o: Tensor, final: Tensor, state_gradient: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor:
        """The op's outputs o, unchanged; in backward `final` gets its gradient from the later chunks, on any rank.

        Shapes: o [n b, chunk, H, V], final [n b, H, K, V]. `state_gradient(do, *inputs)` is what the gradient of o
        sends to the states before the chunks, [n b, H, K, V].
        """
        return _AttachFinalStateGrad.apply(o, final, self, state_gradient, *(x.detach() for x in inputs))

    def exchange_gradients(self, gradient: Tensor) -> Tensor:
        """From the gradients of the states before the chunks held here to those of the states after them.

        `gradient` [n b, H, K, V] is what the chunks' own outputs send to the states before them; the result is alike.
        """
        message, work = _start_gather(gradient.flatten(2), self.shard)
        work.wait()
        gradients = self.shard.to_sequence_order(message).unflatten(-1, self._state[1:])
        return self._carry(gradients, range(self.shard.num_chunks - 1, -1, -1))

    def _carry(self, added: Tensor, order: range) -> Tensor:
        """What arrives at the chunks held here, [n b, H, K, V], from `added` [N, b, H, K, V] of the chunks before them
        in this order; `order` backwards is that of gradients."""
        forward, continues = order.step > 0, self.shard.continues
        transitions = self._transition if forward else self._transition.transpose(-1, -2)
        if continues is not None:
            continues = (continues.roll(-1, 0) if forward else continues)[..., None, None, None]
            added, transitions = added * continues, transitions * continues
        # Small kernels, one after another: one for each chunk.
        pass_on = torch.addcmul if transitions.shape[-1] == 1 else _add_products
        arrived = {order[0]: torch.zeros_like(added[0])}
        for chunk, following in pairwise(order):
            arrived[following] = pass_on(added[chunk], transitions[chunk], arrived[chunk])
        return torch.cat([arrived[chunk] for chunk in self.shard.chunk_ids])


def _add_products(added: Tensor, transition: Tensor, state: Tensor) -> Tensor:
    """added + transition @ state, [b, H, ...] each."""
    return torch.baddbmm(*(x.flatten(0, 1) for x in (added, transition, state))).view_as(added)


def _start_gather(x: Tensor, shard: SequenceShard) -> tuple[Tensor, dist.Work]:
    """[n b, ...] of every rank -> [N, b, ...] in rank-major order, and the all-gather to wait for."""
    gathered = x.new_empty(shard.num_chunks, shard.batch, *x.shape[1:])
    return gathered, dist.all_gather_into_tensor(
        gathered.flatten(0, 1), x.contiguous(), group=shard.group, async_op=True
    )


class _AttachFinalStateGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, final, exchange, state_gradient, *inputs):
        ctx.exchange, ctx.state_gradient = exchange, state_gradient
        ctx.save_for_backward(*inputs)
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        inputs = ctx.saved_tensors
        gradient = ctx.exchange.exchange_gradients(ctx.state_gradient(do, *inputs))
        return do, gradient, None, None, *(None for _ in inputs)
