"""Gated retention on the Triton kernels of kernels.py: what to launch, what to save for the backward pass.

Forward:   decay sums, [segment states, chain,] o and rounded states every ANCHOR_TOKENS.
Backward:  [segment states, chain,] dq, dk, dv in one launch, products of the saved states, gradient of the decay.
The bracketed steps run only if heads alone cannot fill the GPU (tensor parallelism, long sequences).

Tensor legend: B batch, T time, H heads, K key width, V value width.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import log2

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from yoco_megatron.ops.gated_retention import kernels
from yoco_megatron.ops.gated_retention.reference import check_layout, for_each_head
from yoco_megatron.ops.gated_retention.tuning import CHUNK, config_for, num_segments, span_segments
from yoco_megatron.ops.integers import cdiv, next_power_of_2

# Tokens between saved states: shorter blocks give a more accurate decay gradient and cost more memory (K * V values
# per head and block). 512: 7e-3 against 1.1e-2 at 4096 (random inputs, bf16).
ANCHOR_TOKENS = 512
HEAD_DIMS = (16, 32, 64, 128, 256)


def why_not(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """None if the kernels run on such tensors, else the reason in words."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "needs a CUDA GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a GPU of compute capability 9.0 (Hopper) or later"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"takes bfloat16 or float32, not {dtype}"
    if triton.knobs.runtime.interpret and dtype != torch.float32:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if dtype == torch.float32 and max(key_dim, value_dim) > 128:
        return f"takes float32 heads of at most 128, not {key_dim} and {value_dim}"
    if key_dim not in HEAD_DIMS or value_dim not in HEAD_DIMS:
        return f"takes head widths {', '.join(map(str, HEAD_DIMS))}, not {key_dim} and {value_dim}"
    return None


@dataclass(frozen=True)
class Launch:
    """Shapes and choices that the forward and the backward pass of one call share, and all calls of equal shapes."""

    B: int
    T: int
    H: int
    """Heads of v."""
    group: int
    """How many of them share a query and a key."""
    K: int
    V: int
    scale: float
    segments: int
    dtype: torch.dtype
    docs: bool

    @cached_property
    def padded(self) -> int:
        """T, rounded up to whole chunks."""
        return cdiv(self.T, CHUNK) * CHUNK

    @cached_property
    def segment(self) -> int:
        """Tokens per segment: whole chunks; the last segment may be shorter."""
        return cdiv(cdiv(self.T, CHUNK), self.segments) * CHUNK

    @cached_property
    def blocks(self) -> int:
        """Number of saved states."""
        return cdiv(self.T, ANCHOR_TOKENS)

    @cached_property
    def common(self) -> dict:
        """Keyword arguments of all kernels."""
        # Three tf32 products keep float32's accuracy; bf16 operands ignore it.
        precision = "tf32x3" if self.dtype == torch.float32 else "tf32"
        return dict(H=self.H, GROUP=self.group, DOCS=self.docs, BT=CHUNK, PRECISION=precision)


def plan(q: Tensor, v: Tensor, scale: float | None, document_ids: Tensor | None, segments: int | None) -> Launch:
    """Choose how to launch for q [B, T, H / group, K] and v [B, T, H, V]; `segments` None lets the size decide."""
    return _plan(q.shape, v.shape[2], v.shape[3], scale, q.dtype, document_ids is not None, segments, q.device)


@lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size, H: int, V: int, scale: float | None, dtype: torch.dtype, docs: bool, segments: int | None,
    device: torch.device,
) -> Launch:  # fmt: skip
    B, T, shared, K = shape
    scale = K**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"the retention kernel needs scale > 0, got {scale}: it works with its logarithm")
    chunks = cdiv(T, CHUNK)
    if segments is None and device.type == "cuda":
        ahead, back, states = (config_for(kernel, max(K, V), dtype) for kernel in ("forward", "backward", "segment"))
        programs = ahead.slices(V), 2 * back.slices(K) + back.slices(V)
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        segments = num_segments(B * H, chunks, programs, states.tiles(K, V), sms)
    return Launch(B, T, H, H // shared, K, V, scale, _filled(segments or 1, chunks), dtype, docs)


def _filled(segments: int, chunks: int) -> int:
    """The number of segments that hold tokens: rounding segments up to whole chunks may leave the last ones empty."""
    return cdiv(chunks, cdiv(chunks, segments))


def describe(x_BTHD: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks [rows, columns] of the [T, D] planes of x, for the tensor memory accelerator."""
    B, T, H, D = x_BTHD.shape
    b, t, h, _ = x_BTHD.stride()
    # A dimension of length one may have any stride, even one that the accelerator refuses.
    whole = D * T * H
    strides = [b if B > 1 else whole, h if H > 1 else whole, t if T > 1 else whole, 1]
    return TensorDescriptor(x_BTHD, [B, H, T, D], strides, [1, 1, rows, columns])


def loadable(x_BTHD: Tensor) -> Tensor:
    """x itself if the tensor memory accelerator can read it (16-byte strides and address), else a copy."""
    size = x_BTHD.element_size()
    strides = [x_BTHD.stride(i) for i in range(3) if x_BTHD.shape[i] > 1]
    aligned = x_BTHD.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides)
    return x_BTHD if aligned and x_BTHD.stride(3) == 1 else x_BTHD.contiguous()


def describe_sums(sums: Tensor) -> TensorDescriptor:
    """The sums of one chunk at a time."""
    return TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [1, CHUNK])


def pad_ids(document_ids: Tensor | None, launch: Launch) -> Tensor | None:
    """int32 [B, T rounded up to chunks]; the padding belongs to the last document."""
    if document_ids is None:
        return None
    ids = document_ids.to(torch.int32)
    tail = ids[:, -1:].expand(-1, launch.padded - launch.T)
    return torch.cat([ids, tail], dim=1).contiguous()


def decay_sums(gate: Tensor, ids: Tensor | None, launch: Launch, tau: float | None = None) -> Tensor:
    """fp32 [B * H, padded T]: log2 decays summed from the start of each chunk and document.

    gate [B, T, H]: natural log decays, or with `tau` gate logits, whose log decay is logsigmoid(gate) / tau.
    """
    n = 16
    out = torch.empty(launch.B * launch.H, launch.padded, device=gate.device, dtype=torch.float32)
    kernels.decay_sums[(cdiv(launch.padded, n * CHUNK), launch.B * launch.H)](
        gate, ids if launch.docs else out, out, launch.T, launch.padded, *gate.stride(), tau or 1.0,
        H=launch.H, BT=CHUNK, N=n, DOCS=launch.docs, LOGITS=tau is not None,
    )  # fmt: skip
    return out


def _chained_states(
    y: Tensor, z: Tensor, sums: Tensor, ids: Tensor | None, start: Tensor | None, launch: Launch, reverse: bool, n: int
) -> Tensor:
    """fp32 [B * H, n + 1, K, V]: `start` (zeros if None), then the state after each of the first n segments.

    Segments count in the order of the state's walk: `reverse`, from the last one to the left.
    """
    config = config_for("segment", max(launch.K, launch.V), launch.dtype)
    bk, bv = min(launch.K, config.columns), min(launch.V, config.columns)
    heads, size = launch.B * launch.H, launch.K * launch.V
    states = torch.empty(heads, n + 1, launch.K, launch.V, device=y.device, dtype=torch.float32)
    decays = torch.empty(heads, n, device=y.device, dtype=torch.float32)
    kernels.segment_states[(config.tiles(launch.K, launch.V), n, heads)](
        describe(y, CHUNK, bk), describe(z, CHUNK, bv), sums, ids if launch.docs else sums, states, decays,
        launch.T, launch.padded, launch.segment, launch.segments, 0.0 if reverse else log2(launch.scale),
        DK=launch.K, DV=launch.V, BK=bk, BV=bv, CHUNKS=next_power_of_2(launch.segment // CHUNK),
        REVERSE=reverse, **launch.common, **config.options,
    )  # fmt: skip
    block = min(1024, size)
    kernels.chain_segments[(size // block, heads)](
        states, decays, states if start is None else start, n, size, BLOCK=block, HAS_START=start is not None
    )
    return states


def entering_states(
    y: Tensor, z: Tensor, sums: Tensor, ids: Tensor | None, start: Tensor | None, launch: Launch, *, reverse: bool
) -> Tensor | None:
    """fp32 [B * H, segments, K, V]: the state that enters each segment, `start` [B, H, K, V] before the first one.

    In the order of the state's walk, see `_chained_states`. The last segment's update is not needed: the scan that
    starts from these states computes it. With one segment this is `start` itself.
    """
    if launch.segments == 1:
        return start
    return _chained_states(y, z, sums, ids, start, launch, reverse, launch.segments - 1)


def span_state(
    y: Tensor,
    z: Tensor,
    sums: Tensor,
    ids: Tensor | None,
    launch: Launch,
    *,
    reverse: bool,
    segments: int | None = None,
) -> Tensor:
    """fp32 [B, H, K, V]: the update of the state after the whole span; `reverse`: the gradient of the state before it.

    Without outputs, for context parallelism (chunk_state.py has the equations). y, z are k, v; reversed q, do.
    """
    config = config_for("segment", max(launch.K, launch.V), launch.dtype)
    programs = launch.B * launch.H * config.tiles(launch.K, launch.V)
    chunks = launch.padded // CHUNK
    if segments is None and y.is_cuda:
        sms = torch.cuda.get_device_properties(y.device).multi_processor_count
        segments = span_segments(programs, chunks, sms)
    launch = replace(launch, segments=_filled(segments or 1, chunks))
    states = _chained_states(y, z, sums, ids, None, launch, reverse, launch.segments)
    return states[:, -1].unflatten(0, (launch.B, launch.H))


def span_decay(sums: Tensor, ids: Tensor | None, launch: Launch) -> Tensor:
    """fp32 [B, H]: the decay of a state over the whole span; 0 if the span ends in another document."""
    decay = sums[:, CHUNK - 1 :: CHUNK].sum(1).exp2().unflatten(0, (launch.B, launch.H))
    return decay if ids is None else decay.masked_fill((ids[:, :1] != ids[:, -1:]), 0.0)


def _anchor_states(launch: Launch, device: torch.device) -> Tensor:
    shape = (launch.B * launch.H, launch.blocks, launch.K, launch.V)
    return torch.empty(shape, device=device, dtype=launch.dtype)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, ids: Tensor | None, start: Tensor | None, launch: Launch,
    *, out: Tensor, need_final: bool, need_anchors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Write o into `out` [B, T, H, V]; return the final state, the states entering segments, and the anchors."""
    config = config_for("forward", max(launch.K, launch.V), launch.dtype)
    bv = min(launch.V, config.columns)
    entering = entering_states(k, v, sums, ids, start, launch, reverse=False)
    final = None
    if need_final:
        final = torch.empty(launch.B, launch.H, launch.K, launch.V, device=q.device, dtype=torch.float32)
    anchors = _anchor_states(launch, q.device) if need_anchors else None
    kernels.forward[(launch.V // bv, launch.segments, launch.B * launch.H)](
        describe(q, CHUNK, launch.K), describe(k, CHUNK, launch.K), describe(v, CHUNK, bv), describe(out, CHUNK, bv),
        out if anchors is None else anchors, describe_sums(sums), sums, ids if launch.docs else sums,
        sums if entering is None else entering,
        sums if final is None else final, launch.T, launch.padded, launch.segment, launch.segments, launch.blocks,
        log2(launch.scale), DK=launch.K, DV=launch.V, BV=bv, HAS_S0=entering is not None, HAS_FINAL=need_final,
        ANCHOR=ANCHOR_TOKENS if need_anchors else 0, **launch.common, **config.options,
    )  # fmt: skip
    return final, entering, anchors


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, sums: Tensor, ids: Tensor | None, entering: Tensor | None,
    anchors: Tensor, final: Tensor | None, dfinal: Tensor | None, gate: Tensor, launch: Launch,
    *, dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor, need_dstart: bool, tau: float | None = None,
) -> Tensor | None:  # fmt: skip
    """Write dq, dk [B, T, H, K], dv and dgate [B, T, H]; return the gradient of the initial state."""
    config = config_for("backward", max(launch.K, launch.V), launch.dtype)
    bk, bv = min(launch.K, config.columns), min(launch.V, config.columns)
    slices = launch.K // bk
    heads = launch.B * launch.H
    dentering = entering_states(q, do, sums, ids, dfinal, launch, reverse=True)
    dots = torch.empty(2, slices, heads, launch.padded, device=q.device, dtype=torch.float32)
    dstart = None
    if need_dstart:
        dstart = torch.empty(launch.B, launch.H, launch.K, launch.V, device=q.device, dtype=torch.float32)
    danchors = _anchor_states(launch, q.device)
    kernels.backward[(2 * slices + launch.V // bv, launch.segments, heads)](
        *(describe(x, CHUNK, x.shape[-1]) for x in (q, k, v, do)),
        *(describe(x, CHUNK, n) for x, n in ((q, bk), (k, bk), (do, bv), (dq, bk), (dk, bk), (dv, bv))),
        danchors, describe_sums(sums), sums, ids if launch.docs else sums, sums if entering is None else entering,
        sums if dentering is None else dentering, sums if dstart is None else dstart, dots[0], dots[1],
        launch.T, launch.padded, launch.segment, launch.segments, launch.blocks, heads * launch.padded,
        log2(launch.scale), DK=launch.K, DV=launch.V, BK=bk, BV=bv, HAS_S0=entering is not None,
        HAS_R0=dentering is not None, HAS_DS0=need_dstart, ANCHOR=ANCHOR_TOKENS, **launch.common, **config.options,
    )  # fmt: skip
    products = torch.empty(heads, launch.blocks, device=q.device, dtype=torch.float32)
    kernels.anchor_products[(launch.blocks, heads)](
        anchors, danchors, anchors if dfinal is None else final, anchors if dfinal is None else dfinal, products,
        launch.blocks, launch.K * launch.V, BLOCK=min(2048, launch.K * launch.V), HAS_END=dfinal is not None,
    )  # fmt: skip
    kernels.decay_gradient[(launch.blocks, heads)](
        dots[0], dots[1], products, ids if launch.docs else sums, gate, dgate, launch.T, launch.padded, launch.blocks,
        heads * launch.padded, *gate.stride(), *dgate.stride(), tau or 1.0,
        H=launch.H, SLICES=slices, BLOCK=ANCHOR_TOKENS, DOCS=launch.docs, LOGITS=tau is not None,
    )  # fmt: skip
    return dstart


class _GatedRetention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, document_ids, scale, segments):
        launch = plan(q, v, scale, document_ids, segments)
        q, k, v = (loadable(x) for x in (q, k, v))
        ids = pad_ids(document_ids, launch)
        sums = decay_sums(log_decay, ids, launch)
        start = None if initial_state is None else initial_state.float().contiguous()
        out = torch.empty(launch.B, launch.T, launch.H, launch.V, device=q.device, dtype=q.dtype)
        final, entering, anchors = run_forward(
            q, k, v, sums, ids, start, launch, out=out, need_final=True, need_anchors=any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(q, k, v, log_decay, sums, ids, entering, anchors, final)
        ctx.launch = launch
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, sums, ids, entering, anchors, final = ctx.saved_tensors
        launch = ctx.launch
        do = torch.zeros_like(v) if do is None else loadable(do.to(v.dtype))
        dq, dk = (q.new_empty(*v.shape[:3], launch.K) for _ in range(2))
        dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)
        dgate = torch.empty(launch.B, launch.T, launch.H, device=q.device, dtype=torch.float32)
        dstart = run_backward(
            q, k, v, do, sums, ids, entering, anchors, final, None if dfinal is None else dfinal.float().contiguous(),
            log_decay, launch, dq=dq, dk=dk, dv=dv, dgate=dgate, need_dstart=ctx.needs_input_grad[4],
        )  # fmt: skip
        if launch.group > 1:
            dq, dk = (x.unflatten(2, (-1, launch.group)).sum(3) for x in (dq, dk))
        return dq, dk, dv, dgate.to(log_decay.dtype), dstart, None, None, None


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated retention of a whole sequence, differentiable in q, k, v, log_decay and initial_state.

    Arguments, results and errors are those of `torch.chunkwise`, for bfloat16 and float32; `chunk_size` is the torch
    path's and ignored here. `segments` splits the sequence for more parallelism; None lets the size decide. The
    states and all sums are float32. Deterministic: no atomics, one order of sums.
    """
    check_layout(q, k, v, log_decay, initial_state, document_ids)
    return _GatedRetention.apply(q, k, v, log_decay, initial_state, document_ids, scale, segments)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    scale: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for decoding; arguments and results are those of `torch.step`, without gradients.

    With `in_place` the float32 state [B, H, K, V] is overwritten and returned: one read and one write of it is all the
    traffic there is.
    """
    B, H, V = v.shape
    K = q.shape[-1]
    q, k = for_each_head(q, k, H)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if state is not None:
        state = state.float().contiguous()
    new = state if in_place and state is not None else torch.empty(B, H, K, V, device=q.device, dtype=torch.float32)
    out = torch.empty(B, H, V, device=q.device, dtype=q.dtype)
    columns = min(V, 32)
    kernels.step[(V // columns, B * H)](
        q, k, v, log_decay, new if state is None else state, new, out, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *log_decay.stride(), K**-0.5 if scale is None else scale,
        H=H, DK=K, DV=V, BV=columns, HAS_STATE=state is not None, num_warps=4,
    )  # fmt: skip
    return out, new
