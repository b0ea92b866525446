"""A save in the background copies a GPU's tensors, and returns when later steps may change them."""

import pytest
import torch

from yoco_megatron.runtime.host_buffer import HostBuffer

pytestmark = pytest.mark.gpu


def test_tensors_of_a_gpu_are_copied_into_pinned_memory() -> None:
    ours = HostBuffer()
    theirs = HostBuffer(ours.descriptor)
    for size in (1 << 20, 1 << 24):  # it grows, and is pinned anew
        wanted = torch.randn(2, size, dtype=torch.bfloat16)
        on_gpu = wanted.cuda()
        place = ours.store({"rows": on_gpu, "column": on_gpu[:, 0], "host": wanted})
        on_gpu.zero_()
        torch.cuda.synchronize()
        read = theirs.load(place)
        assert torch.equal(read["rows"], wanted) and torch.equal(read["host"], wanted)
        assert torch.equal(read["column"], wanted[:, 0]) and not read["column"].is_cuda
        assert ours._pinned is not None and ours._pinned.numel() >= 2 * wanted.nbytes
