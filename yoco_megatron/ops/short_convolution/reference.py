"""The short convolution, slow and obviously right: one token and one tap at a time, in float64.

Tensor legend: B batch, T time, C channels, W width of the kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_layout(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document_ids: Tensor | None
) -> None:
    """Raises ValueError for another layout than `recurrent` describes, which might broadcast into a wrong result."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"a short convolution needs x of shape [B, T, C] with T >= 1, got {list(x.shape)}")
    B, T, C = x.shape
    if weight.ndim != 2 or weight.shape[0] != C:
        raise ValueError(f"a short convolution needs a weight of shape [{C}, W], got {list(weight.shape)}")
    wanted = {
        "bias": (bias, (C,)),
        "initial_state": (initial_state, (B, weight.shape[1] - 1, C)),
        "document_ids": (document_ids, (B, T)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"a short convolution needs {name} of shape {list(shape)}, got {list(tensor.shape)}")


def recurrent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition.

    Shapes: x [B, T, C]; weight [C, W], its last column for the token itself; bias [C] or None; document_ids integers
    [B, T], equal within a document and non-decreasing, or None for one. A state [B, W - 1, C] has the last inputs of a
    document, oldest first, and zeros where the document had none yet: `initial_state` (zeros if None) those before the
    first token, which it continues; the final one those of the last token's document.
    Returns y [B, T, C] and the final state, both float64. Raises ValueError for another layout.
    """
    check_layout(x, weight, bias, initial_state, document_ids)
    x, weight = x.double(), weight.double()
    B, _, C = x.shape
    state = x.new_zeros(B, weight.shape[1] - 1, C) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(x.shape[1]):
        if t > 0 and document_ids is not None:
            state = torch.where((document_ids[:, t] == document_ids[:, t - 1])[:, None, None], state, 0.0)
        seen = torch.cat((state, x[:, t : t + 1]), dim=1)
        y = torch.einsum("bwc,cw->bc", seen, weight)
        outputs.append(F.silu(y if bias is None else y + bias.double()))
        state = seen[:, 1:]
    return torch.stack(outputs, dim=1), state
