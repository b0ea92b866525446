"""Gated retention over chunks that lie on different context-parallel ranks.

Each rank computes what its chunks add to the state, one small all-gather shares it, and each rank adds up the chunks
before its own. With w_j the state update of chunk j, a_j its decay from end to end, and e_j whether the document
continues from chunk j - 1 into j, the state that enters chunk c is

    S_c = sum_{j<c} e_{j+1} (prod_{j<m<c} a_m e_{m+1}) w_j

The op then runs on each chunk with S_c as its initial state. Backward is the mirror image: the gradients that the
outputs of later chunks send to the states before them, exchanged the same way, make the gradient of a chunk's final
state.

Tensor legend: N chunks of the sequence, n chunks held here, b batch, H heads, K key width, V value width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.ops.gated_retention.chunk_state import state_gradient, state_update
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class StateExchange:
    """The exchange of one layer and micro-batch. Made early, it runs while the caller prepares the op.

    Args:
        update: [n b, H, K, V], what each chunk held here adds to the state, chunks in the batch dimension
            (`SequenceShard.fold`).
        decay: [n b, H], each chunk's decay of the state that enters it (both from ops.gated_retention.chunk_state).
    """

    def __init__(self, update: Tensor, decay: Tensor, shard: SequenceShard) -> None:
        self.shard = shard
        self._all = torch.arange(shard.num_chunks, device=update.device)
        # Without a copy from the host: the rank's chunks are r and N - 1 - r.
        self._own = torch.stack((self._all[shard.rank], self._all[-1 - shard.rank]))
        self._state = update.shape[1:]
        self._message, self._work = _start_gather(torch.cat((update.flatten(2), decay[..., None]), -1), shard)

    @staticmethod
    def start(
        k: Tensor, v: Tensor, log_decay: Tensor, shard: SequenceShard, scale: float | None = None
    ) -> "StateExchange":
        """The exchange for the op's k, v, log_decay and scale, chunks in the batch dimension; no path for gradients."""
        with torch.no_grad():
            return StateExchange(*state_update(k, v, log_decay, shard.folded_document_ids, scale=scale), shard)

    def initial_states(self) -> Tensor:
        """The states that enter the chunks held here, [n b, H, K, V], contiguous, without a path for gradients.

        `attach_final_state_grad` computes their gradients' part in backward.
        """
        self._work.wait()
        message = self.shard.to_sequence_order(self._message)
        del self._message  # what backward needs is small
        update_NbHS, decay_NbH1 = message.split((message.shape[-1] - 1, 1), -1)
        self._decay_NbH = decay_NbH1.squeeze(-1).clone()
        decay_between = self._decay_between(self._own, self._all)
        states = torch.einsum("csbh,sbhx->cbhx", decay_between, update_NbHS)
        return states.flatten(0, 1).unflatten(-1, self._state[1:]).contiguous()

    def attach_final_state_grad(self, o: Tensor, final: Tensor, q: Tensor, log_decay: Tensor) -> Tensor:
        """The op's outputs o, unchanged; in backward `final` gets its gradient from the later chunks, on any rank.

        Shapes: o [n b, chunk, H, V], final [n b, H, K, V], q [n b, chunk, H, K], log_decay [n b, chunk, H].
        """
        return _AttachFinalStateGrad.apply(o, final, q.detach(), log_decay.detach(), self)

    def exchange_gradients(self, gradient: Tensor) -> Tensor:
        """From the gradients of the states before the chunks held here to those of the states after them.

        `gradient` [n b, H, K, V] is what the chunks' own outputs send to the states before them; the result is alike.
        """
        message, work = _start_gather(gradient.flatten(2), self.shard)
        work.wait()
        decay_between = self._decay_between(self._all, self._own)
        states = torch.einsum("csbh,cbhx->sbhx", decay_between, self.shard.to_sequence_order(message))
        return states.reshape(gradient.shape).contiguous()

    def _decay_between(self, chunks: Tensor, sources: Tensor) -> Tensor:
        """The share of each source chunk's update that is left when `chunks` begin, [chunks, sources, b, H]."""
        between = torch.arange(self.shard.num_chunks, device=chunks.device)
        after, before = sources[:, None] < between, between < chunks[:, None]  # [sources, N], [chunks, N]
        passed = (before[:, None] & after)[..., None, None]
        left = torch.where(passed, self._decay_NbH, 1.0).prod(2) * (sources < chunks[:, None])[..., None, None]
        if self.shard.continues is None:
            return left
        reached = before | (between == chunks[:, None])
        crossed = (reached[:, None] & after)[..., None]
        return left * (~crossed | self.shard.continues).all(2)[..., None]


def _start_gather(x: Tensor, shard: SequenceShard) -> tuple[Tensor, dist.Work]:
    """[n b, ...] of every rank -> [N, b, ...] in rank-major order, and the all-gather to wait for."""
    gathered = x.new_empty(shard.num_chunks, shard.batch, *x.shape[1:])
    return gathered, dist.all_gather_into_tensor(
        gathered.flatten(0, 1), x.contiguous(), group=shard.group, async_op=True
    )


class _AttachFinalStateGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, final, q, log_decay, exchange):
        ctx.exchange = exchange
        ctx.save_for_backward(q, log_decay)
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        q, log_decay = ctx.saved_tensors
        exchange = ctx.exchange
        gradient = state_gradient(q, do, log_decay, exchange.shard.folded_document_ids)
        return do, exchange.exchange_gradients(gradient), None, None, None
