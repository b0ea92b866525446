"""What mixers of a YOCO's self-decoder with a recurrent state are made of.

Shapes: b batch, s new tokens, H heads, C channels, K and V widths of keys and values.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    # The trainer's kernels, where it is installed; the torch code below computes the same.
    from yoco_megatron.ops import gated_retention as retention_kernels
except ImportError:
    retention_kernels = None  # type: ignore[assignment]

CHUNK, PIECE = 128, 4096


def widen(x: Tensor) -> Tensor:
    """16-bit tensors as fp32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class YocoRMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) in fp32, back to x's dtype, then times the weight (if there is one)."""

    def __init__(self, dim: int, eps: float, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else self.weight * y


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[b, s, H D] -> [b, H, s, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + scale k_t^T v_t, o_t = q_t S_t, in chunks; scale is K^-1/2 by default.

    q, k [b, H, s, K], or of fewer heads, each for as many of v's; v [b, H, s, V]; log_decay [b, H, s] and state
    [b, H, K, V] in fp32 (fp64); documents [b, s] as `documents_of` returns them: the state does not cross from one to
    the next. Returns (o in q's dtype, state).
    """
    dtype, compute, group = q.dtype, state.dtype, v.shape[1] // q.shape[1]
    if group > 1:
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
    q, k, v = q.to(compute), k.to(compute) * (k.shape[-1] ** -0.5 if scale is None else scale), v.to(compute)
    if q.shape[2] == 1:
        state = log_decay[..., None].exp() * state + k.transpose(-1, -2) @ v
        return (q @ state).to(dtype), state
    if documents is None:
        documents = torch.zeros(1, q.shape[2], dtype=torch.int32, device=q.device)
    outputs, before = [], documents[:, :1]
    pieces = zip(*(t.split(PIECE, dim=2) for t in (q, k, v, log_decay)), documents.split(PIECE, dim=1))
    for q_, k_, v_, g_, d_ in pieces:
        o, state = retention_of_piece(q_, k_, v_, g_, state, d_, before)
        outputs.append(o)
        before = d_[:, -1:]
    return torch.cat(outputs, dim=2).to(dtype), state


def retention_of_piece(q, k, v, log_decay, state, documents, before) -> tuple[Tensor, Tensor]:
    """`retention` of chunks that are computed at once: of a loop, torch.compile would compile each turn.

    before [b or 1, 1]: the document of the state.
    """
    length = q.shape[2]
    chunk = min(CHUNK, length)
    padding = -length % chunk  # of tokens that neither write nor decay
    q, k, v = (F.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    from_start = F.pad(log_decay, (0, padding)).unflatten(2, (-1, chunk)).cumsum(-1)
    documents = torch.cat((documents, documents[:, -1:].expand(-1, padding)), 1).unflatten(1, (-1, chunk))[:, None]
    at_end = torch.cat((before[:, None], documents[..., -1]), -1)  # of the state, and of each chunk's last token

    to_end = from_start[..., -1:] - from_start
    to_end = to_end.masked_fill(documents != at_end[..., 1:, None], -torch.inf).exp()[..., None]
    written = (k * to_end).transpose(-1, -2) @ v
    # Each sum of chunks by itself: as differences of sums over the whole piece they would be less precise.
    later = torch.ones(written.shape[2] + 1, written.shape[2] + 1, dtype=torch.bool, device=q.device).tril(-1)
    of_chunks = F.pad(from_start[..., -1], (1, 0))[..., None].masked_fill(~later, 0.0).cumsum(-2)
    states = decays(of_chunks, at_end) @ torch.cat((state.unsqueeze(2), written), 2).flatten(3)
    states = states.unflatten(3, written.shape[3:])  # before each chunk, and after the last

    in_chunks = decays(from_start[..., :, None] - from_start[..., None, :], documents)
    from_start = from_start.masked_fill(documents != at_end[..., :-1, None], -torch.inf).exp()[..., None]
    o = (q @ k.transpose(-1, -2) * in_chunks) @ v + (q * from_start) @ states[:, :, :-1]
    return o.flatten(2, 3)[:, :, :length], states[:, :, -1]


def decays(sums: Tensor, documents: Tensor) -> Tensor:
    """exp(sums) [..., n, n] from each j to each i >= j of its document, else 0; documents [..., n]."""
    causal = torch.ones(sums.shape[-2:], dtype=torch.bool, device=sums.device).tril()
    visible = causal & (documents[..., :, None] == documents[..., None, :])
    # Masked before exp: above the diagonal the exponent is positive.
    return sums.masked_fill(~visible, -torch.inf).exp()


def retention_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by the trainer's kernels, whose layout is [b, s, H, K]."""
    if q.shape[2] == 1:
        q, k, v, log_decay = (t.squeeze(2) for t in (q, k, v, log_decay))
        in_place = not torch.is_grad_enabled()
        o, state = retention_kernels.step(q, k, v, log_decay, state, scale=scale, in_place=in_place)
        return o.unsqueeze(2), state
    q, k, v, log_decay = (t.transpose(1, 2) for t in (q, k, v, log_decay))
    o, state = retention_kernels.gated_retention(
        q, k, v, log_decay, scale=scale, initial_state=state, document_ids=documents
    )
    return o.transpose(1, 2), state


def cached_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    mask: Tensor | None,
    layer: Any,
    documents: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """The outputs o [b, H, s, V] of `retention`, from the state in a layer of transformers' cache (None: no cache),
    which the new one replaces. mask [b, s]: 0 for padding."""
    if mask is not None:  # a padding token writes nothing and lets nothing decay
        log_decay, k = log_decay * mask[:, None], k * mask[:, None, :, None].to(k.dtype)
    by_kernel = retention_kernels is not None and q.is_cuda and not torch.compiler.is_compiling()
    run = retention_by_kernel if by_kernel else retention
    return from_cached_state(run, layer, q, k, v, log_decay, documents=documents, scale=scale)


def from_cached_state(
    run: Callable[..., tuple[Tensor, Tensor]],
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *others: Tensor,
    **options: Any,
) -> Tensor:
    """The outputs of `run(q, k, v, log_decay, *others, state=, **options)`, from the state in a layer of transformers'
    cache (None: no cache), which the new one replaces."""
    state = None if layer is None else layer.recurrent_states[0]
    if state is None:
        state = log_decay.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        o, state = run(q, k, v, log_decay, *others, state=state, **options)
    if layer is not None:
        layer.update_recurrent_state(state)
        # transformers marks a layer as filled with its convolution's state, which retention has none of.
        layer.has_previous_state[0] = True
    return o


def short_convolution(
    x: Tensor, convolutions: list[nn.Conv1d], mask: Tensor | None, layer: Any, documents: Tensor | None
) -> Tensor:
    """silu of the causal convolution of each channel, x [b, s, C] -> [b, s, C].

    `convolutions` have the channels' weights one after another. The inputs before the first token are in the layer of
    transformers' cache, which then gets the last ones.
    """
    weight = torch.cat([convolution.weight for convolution in convolutions]).squeeze(1)
    biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
    length, taps = x.shape[1], weight.shape[1] - 1
    if mask is not None:
        x = x * mask[..., None].to(x.dtype)
    seen = x
    if layer is not None:
        seen = layer.update_conv_state(x.transpose(1, 2), conv_kernel_size=taps).transpose(1, 2)
    seen = F.pad(seen, (0, 0, length + taps - seen.shape[1], 0))
    y = widen(torch.cat(biases)) if biases else widen(x.new_zeros(()))
    for tap, of_channels in enumerate(widen(weight).unbind(1)):
        inputs = seen[:, tap : tap + length]
        if documents is not None:
            ids = F.pad(documents, (taps, 0), value=-1)[:, tap : tap + length]
            inputs = inputs.masked_fill((ids != documents)[..., None], 0.0)
        y = y + widen(inputs) * of_channels
    return F.silu(y).to(x.dtype)
