"""Small integers that the host computes and kernels read."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: Sequence[int] | np.ndarray, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A copy on the device, for which the host does not wait: from pageable memory it would."""
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)
