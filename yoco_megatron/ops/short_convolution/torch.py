"""The short convolution in plain torch: W shifted products; nothing but the input is stored for backward.

Tensor legend: B batch, T time, C channels, W width of the kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.recomputed import recomputed
from yoco_megatron.ops.short_convolution.reference import check_layout


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the final state: arguments, shapes and errors are those of `reference.recurrent`.

    Arithmetic is float32, or float64 if x is; y and the state are in x's dtype. Differentiable in all but document_ids.
    With T = 1 and a state it is a step of decoding.
    """
    check_layout(x, weight, bias, initial_state, document_ids)
    taps = weight.shape[1] - 1
    y = recomputed(_convolve, x, weight, bias, initial_state, document_ids)
    state = _last(_padded(_last(x, taps), initial_state, taps), taps)
    if document_ids is not None:
        # Inputs before the first token belong to its document.
        ids = _last(torch.cat((document_ids[:, :1].expand(-1, taps), _last(document_ids, taps)), dim=1), taps)
        state = state.masked_fill((ids != document_ids[:, -1:])[..., None], 0.0)
    return y, state


def _last(x: Tensor, tokens: int) -> Tensor:
    return x[:, max(0, x.shape[1] - tokens) :]


def _padded(x: Tensor, initial_state: Tensor | None, taps: int) -> Tensor:
    if initial_state is None:
        return F.pad(x, (0, 0, taps, 0))
    return torch.cat((initial_state.to(x.dtype), x), dim=1)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_ids: Tensor | None
) -> Tensor:
    T, W = x.shape[1], weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = _padded(x, initial_state, W - 1)
    y = x.new_zeros((), dtype=compute) if bias is None else bias.to(compute)
    for tap, of_channels in enumerate(weight.to(compute).unbind(1)):
        seen = padded[:, tap : tap + T]
        if document_ids is not None and tap < W - 1:
            ids = torch.cat((document_ids[:, :1].expand(-1, W - 1), document_ids), dim=1)[:, tap : tap + T]
            seen = seen.masked_fill((ids != document_ids)[..., None], 0.0)
        y = torch.addcmul(y, seen.to(compute), of_channels)
    return F.silu(y).to(x.dtype)
