"""What one process stores in the shared memory is what the other reads, whatever becomes of the originals."""

from types import SimpleNamespace

import pytest
import torch

from yoco_megatron.runtime import host_buffer
from yoco_megatron.runtime.host_buffer import HostBuffer

TENSORS = {
    "fp32": torch.randn(3, 5),
    "bf16, transposed": torch.randn(4, 6).to(torch.bfloat16).T,
    "bool": torch.tensor([True, False, True]),
    "one number": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "expanded": torch.randn(1, 2).expand(3, 2),
}


@pytest.fixture
def ends():
    ours = HostBuffer()
    return ours, HostBuffer(ours.descriptor)


def test_tensors_are_copies_of_their_own_size(ends):
    ours, theirs = ends
    place = ours.store({"tensors": TENSORS, "text": "x"})
    read = theirs.load(place)
    assert read["text"] == "x" and read["tensors"].keys() == TENSORS.keys()
    for name, tensor in read["tensors"].items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype, name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, "torch.save writes whole storages"


def test_what_changes_afterwards_is_not_seen(ends):
    ours, theirs = ends
    weights = torch.zeros(1000)
    place = ours.store([weights])
    weights += 1
    assert theirs.load(place)[0].sum() == 0


def test_it_grows_and_is_used_again(ends):
    ours, theirs = ends
    sizes = []
    for size in (10, 100_000, 1000, 100_000):
        assert torch.equal(theirs.load(ours.store(torch.full((size,), float(size)))), torch.full((size,), float(size)))
        sizes.append(len(ours._memory))
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_one_object_is_left_out(ends):
    ours, theirs = ends
    cannot_be_pickled = (one for one in ())
    place = ours.store([1, cannot_be_pickled], left_out=cannot_be_pickled)
    assert theirs.load(place, left_out="another") == [1, "another"]


def test_too_little_memory_is_an_error(ends, monkeypatch):
    monkeypatch.setattr(host_buffer.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(
        OSError, match=r"4,0.* more bytes of host memory are needed to save in the background, 1,000 are"
    ):
        ends[0].store(torch.zeros(1000))
