"""The retention mixer, all between a layer's two projections, on views of the fused projection, without split or cat.

Forward:   rotate q, k; decay sums; retention; norm times gate: four kernels.
Backward:  norm and gate; retention, whose gradients land in their places of one buffer; gradient of the gate logits;
           rotate dq, dk back.

q and k are rotated in place by default: nothing else reads the projection's output, and a copy would be as large as a
layer's input. tests/support/retention_mixer.py is the same chain in plain torch.

Tensor legend: S sequence, B batch, H heads, D head width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from yoco_megatron.ops.fused import retention_mixer_kernels
from yoco_megatron.ops.fused.rotary import rotate_into
from yoco_megatron.ops.gated_retention import triton as retention
from yoco_megatron.ops.integers import next_power_of_2


def _norm_gate(o: Tensor, gate: Tensor, eps: float, y: Tensor) -> None:
    """y = silu(gate) * RMS(o), all [S, B, H, D]; gate strided."""
    S, B, H, D = o.shape
    retention_mixer_kernels.norm_gate[(S * B,)](
        o, gate, y, gate.stride(1), gate.stride(2), eps, H=H, HP=next_power_of_2(H), D=D, num_warps=4
    )


def _chunks(count: int, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """For each of `count` context-parallel chunks: its rows of tensors [S, B, ...], as views [B, chunk, ...]."""
    if count == 1:
        return iter([[x.transpose(0, 1) for x in tensors]])
    return zip(*([part.transpose(0, 1) for part in x.chunk(count)] for x in tensors))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvg, logits, angles, document_ids, tau, eps, in_place, count, make_exchange, recompute_fns):
        S, B, width = qkvg.shape
        D = angles.shape[-1]
        x = qkvg.contiguous().view(S, B, width // (4 * D), 4, D)
        H = x.shape[2]
        rotated = x if in_place else torch.empty(S, B, H, 2, D, device=x.device, dtype=x.dtype)
        rotate_into(x, rotated, angles, 2)
        q, k, v = rotated[..., 0, :], rotated[..., 1, :], x[..., 2, :]
        ids_of = [None] * count if document_ids is None else document_ids.chunk(count)
        o = torch.empty(S, B, H, D, device=x.device, dtype=x.dtype)
        chunks = list(_chunks(count, q, k, v, logits, o))
        launch = retention.plan(chunks[0][0], chunks[0][2], None, ids_of[0], None)
        ids_of = [retention.pad_ids(ids, launch) for ids in ids_of]
        sums_of = [retention.decay_sums(chunk[3], ids, launch, tau) for chunk, ids in zip(chunks, ids_of)]
        exchange, starts = None, [None] * count
        if make_exchange:
            each = list(zip(chunks, sums_of, ids_of))
            update = [retention.span_state(c[1], c[2], sums, ids, launch, reverse=False) for c, sums, ids in each]
            decay = [retention.span_decay(sums, ids, launch) for _, sums, ids in each]
            exchange = make_exchange(torch.cat(update), torch.cat(decay))
            starts = exchange.initial_states().chunk(count)
        saved = []
        for (q_c, k_c, v_c, _, o_c), ids, sums, start in zip(chunks, ids_of, sums_of, starts):
            final, entering, anchors = retention.run_forward(
                q_c, k_c, v_c, sums, ids, start, launch,
                out=o_c, need_final=exchange is not None, need_anchors=any(ctx.needs_input_grad),
            )  # fmt: skip
            saved += [sums, ids, entering, anchors, final]
        y = torch.empty_like(o)
        _norm_gate(o, x[..., 3, :], eps, y)
        ctx.save_for_backward(x, rotated, logits, angles, o, *saved)
        ctx.launch, ctx.exchange, ctx.tau, ctx.eps, ctx.count = launch, exchange, tau, eps, count
        if recompute_fns is not None:
            recompute_fns.append(lambda out: _norm_gate(o, x[..., 3, :], eps, out.view_as(o)))
        return y.flatten(2)

    @staticmethod
    def backward(ctx, dy):
        x, rotated, logits, angles, o, *saved = ctx.saved_tensors
        S, B, H, _, D = x.shape
        dx, do, gate = torch.empty_like(x), torch.empty_like(o), x[..., 3, :]
        retention_mixer_kernels.norm_gate_backward[(S * B,)](
            o, gate, dy.contiguous(), do, dx[..., 3, :], gate.stride(1), gate.stride(2), ctx.eps,
            H=H, HP=next_power_of_2(H), D=D, num_warps=8,
        )  # fmt: skip
        q, k, v = rotated[..., 0, :], rotated[..., 1, :], x[..., 2, :]
        dlogits = torch.empty_like(logits)
        gradients = (*(dx[..., part, :] for part in range(3)), dlogits)
        chunks = list(_chunks(ctx.count, q, k, v, do, logits, *gradients))
        dfinals = [None] * ctx.count
        if ctx.exchange:
            state_gradients = [
                retention.span_state(chunk[0], chunk[3], saved[at], saved[at + 1], ctx.launch, reverse=True)
                for chunk, at in zip(chunks, range(0, len(saved), 5))
            ]
            dfinals = ctx.exchange.exchange_gradients(torch.cat(state_gradients)).chunk(ctx.count)
        for chunk, dfinal, at in zip(chunks, dfinals, range(0, len(saved), 5)):
            q_c, k_c, v_c, do_c, g_c, dq, dk, dv, dg = chunk
            sums, ids, entering, anchors, final = saved[at : at + 5]
            retention.run_backward(
                q_c, k_c, v_c, do_c, sums, ids, entering, anchors, final, dfinal, g_c, ctx.launch,
                dq=dq, dk=dk, dv=dv, dgate=dg, need_dstart=False, tau=ctx.tau,
            )  # fmt: skip
        rotate_into(dx, dx, angles, 2, backwards=True)
        return dx.flatten(2), dlogits, *[None] * 8


def mix(
    qkvg: Tensor,
    logits: Tensor,
    angles: Tensor,
    *,
    tau: float,
    eps: float,
    document_ids: Tensor | None = None,
    in_place: bool = True,
    cp_chunks: int = 1,
    exchange: Callable | None = None,
    recompute_fns: list[Callable[[Tensor], None]] | None = None,
) -> Tensor:
    """From a layer's input projection to its output projection, in bfloat16 or float32.

    Shapes: qkvg [S, B, H * 4 * D], a head's q, k, v and gate side by side; logits [S, B, H]; angles fp32
    [S, 1 or B, 1, D], equal in pairs (2j, 2j+1), which are rotated together; document_ids [B, S] or None. Returns
    [S, B, H * D] in qkvg's dtype. `tau` is the decay's temperature, `eps` the norm's.

    With `in_place`, q and k inside qkvg are overwritten by their rotation: right if qkvg is a projection's fresh
    output, wrong if it is saved to run this again (recompute of the core).

    Context parallelism: S are `cp_chunks` chunks of equal length from different places of a sequence, document_ids
    [cp_chunks * B, chunk], and `exchange(update, decay)` makes a StateExchange (parallel/context/state_exchange.py).

    `recompute_fns` gets a function that recomputes the result into a tensor like it, from what backward saves.
    """
    return _Mix.apply(qkvg, logits, angles, document_ids, tau, eps, in_place, cp_chunks, exchange, recompute_fns)
