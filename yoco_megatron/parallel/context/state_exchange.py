"""Gated retention over chunks that lie on different context-parallel ranks.

Each rank works out what its chunks add to the state, one small all-gather tells it to everyone, and each combines what
precedes its own chunks. With w_j what chunk j writes, a_j the share of the state that it keeps, and e_j whether the
document goes on from chunk j - 1 into j, the state that enters chunk c is

    S_c = sum_{j<c} e_{j+1} (prod_{j<m<c} a_m e_{m+1}) w_j

The op then runs on each chunk with S_c as its initial state. Backward is the mirror: what the outputs of later chunks
give to the states before them, exchanged the same way, is the gradient of a chunk's final state.

Tensor legend: N chunks of the sequence, n chunks held here, b batch, H heads, K key width, V value width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.ops.gated_retention.chunk_state import state_gradient, state_written
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


class StateExchange:
    """The exchange of one layer and micro-batch. Made early, it runs while the caller prepares the op.

    Args:
        written [n b, H, K, V], kept [n b, H]: what each chunk held here adds to the state and keeps of it
            (ops.gated_retention.chunk_state), chunks in the batch dimension (`SequenceShard.fold`).
    """

    def __init__(self, written: Tensor, kept: Tensor, shard: SequenceShard) -> None:
        self.shard = shard
        self._all = torch.arange(shard.num_chunks, device=written.device)
        # Without a copy from the host: the rank's chunks are r and N - 1 - r.
        self._own = torch.stack((self._all[shard.rank], self._all[-1 - shard.rank]))
        self._state = written.shape[1:]
        self._message, self._work = _start_gather(torch.cat((written.flatten(2), kept[..., None]), -1), shard)

    @staticmethod
    def start(k: Tensor, v: Tensor, log_decay: Tensor, shard: SequenceShard) -> "StateExchange":
        """The exchange for the op's k, v and log_decay, chunks in the batch dimension; no path for gradients."""
        with torch.no_grad():
            return StateExchange(*state_written(k, v, log_decay, shard.folded_document_ids), shard)

    def entering(self) -> Tensor:
        """The states before each chunk held here [n b, H, K, V], contiguous; for their gradients see `tie`."""
        self._work.wait()
        message = self.shard.in_order(self._message)
        self._message = None  # what backward needs is small
        written_NbHS, kept_NbH1 = message.split((message.shape[-1] - 1, 1), -1)
        self._kept_NbH = kept_NbH1.squeeze(-1).clone()
        left = self._left(self._own, self._all)
        states = torch.einsum("csbh,sbhx->cbhx", left, written_NbHS)
        return states.flatten(0, 1).unflatten(-1, self._state[1:]).contiguous()

    def tie(self, o: Tensor, final: Tensor, q: Tensor, log_decay: Tensor) -> Tensor:
        """The op's outputs o; its final states get their gradient from the chunks after them, on any rank."""
        return _Tie.apply(o, final, q.detach(), log_decay.detach(), self)

    def mirror(self, gradient: Tensor) -> Tensor:
        """From the gradients of the states before the chunks held here to those of the states after them.

        `gradient` is what the chunks' own outputs give to the states before them, [n b, H, K, V].
        """
        message, work = _start_gather(gradient.flatten(2), self.shard)
        work.wait()
        left = self._left(self._all, self._own)
        states = torch.einsum("csbh,cbhx->sbhx", left, self.shard.in_order(message))
        return states.reshape(gradient.shape).contiguous()

    def _left(self, chunks: Tensor, sources: Tensor) -> Tensor:
        """The share of what `source` wrote that is left when `chunk` begins, [chunks, sources, b, H]."""
        between = torch.arange(self.shard.num_chunks, device=chunks.device)
        after, before = sources[:, None] < between, between < chunks[:, None]  # [sources, N], [chunks, N]
        passed = (before[:, None] & after)[..., None, None]
        left = torch.where(passed, self._kept_NbH, 1.0).prod(2) * (sources < chunks[:, None])[..., None, None]
        if self.shard.continues is None:
            return left
        reached = before | (between == chunks[:, None])
        crossed = (reached[:, None] & after)[..., None]
        return left * (~crossed | self.shard.continues).all(2)[..., None]


def _start_gather(x: Tensor, shard: SequenceShard) -> tuple[Tensor, dist.Work]:
    """[n b, ...] of every rank -> [N, b, ...], as ranks hold them."""
    gathered = x.new_empty(shard.num_chunks, shard.batch, *x.shape[1:])
    return gathered, dist.all_gather_into_tensor(
        gathered.flatten(0, 1), x.contiguous(), group=shard.group, async_op=True
    )


class _Tie(torch.autograd.Function):
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
        return do, exchange.mirror(gradient), None, None, None
