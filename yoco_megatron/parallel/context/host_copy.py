"""Small tensors that the host computes and kernels read."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a host tensor, for which the host does not wait: from pageable memory it would."""
    return x.to(device) if torch.device(device).type == "cpu" else x.pin_memory().to(device, non_blocking=True)
