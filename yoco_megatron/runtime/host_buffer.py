"""Host memory that a process shares with a child, which reads the tensors in it without another copy.

It is an anonymous file: no mount limits its size, as /dev/shm does in many containers, and nothing of it stays behind
where both are killed. With a GPU it is pinned, so that copies run at the speed of the bus; it is kept for the next use,
as memory is pinned at a few GB a second.
"""

import io
import logging
import math
import mmap
import os
import pickle
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes, of each tensor
LEFT_OUT = "left out"


class _Pickler(pickle.Pickler):
    """Lays the tensors out one after another; the pickle holds their places."""

    def __init__(self, file: io.BytesIO, left_out: object) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.left_out, self.end = left_out, 0
        self.tensors: list[tuple[int, torch.Tensor]] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            start, self.end = self.end, self.end + -(-value.numel() * value.itemsize // ALIGNMENT) * ALIGNMENT
            self.tensors.append((start, value.detach()))
            return start, value.dtype, tuple(value.shape)
        return LEFT_OUT if self.left_out is not None and value is self.left_out else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, text: bytes, buffer: "HostBuffer", left_out: object) -> None:
        super().__init__(io.BytesIO(text))
        self.buffer, self.left_out = buffer, left_out

    def persistent_load(self, place: Any) -> Any:
        return self.left_out if place == LEFT_OUT else self.buffer.view(*place)


class HostBuffer:
    """One process stores a value, tells the other where it lies, and must wait until that is done with it."""

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of the other process's buffer, inherited; by default a new one, without memory yet."""
        self.descriptor = os.memfd_create("checkpoint") if descriptor is None else descriptor
        self._memory: mmap.mmap | None = None
        self._pinned: torch.Tensor | None = None

    def store(self, value: Any, left_out: object = None) -> tuple[int, int]:
        """Copy a picklable value, its tensors from whatever device; returns where its pickle lies.

        Args:
            left_out: an object inside that cannot be pickled; `load` puts another one into its place.
        Raises:
            OSError: there is not so much host memory.
        """
        file = io.BytesIO()
        pickler = _Pickler(file, left_out)
        pickler.dump(value)
        start, end = pickler.end, pickler.end + file.tell()
        on_gpu = any(tensor.is_cuda for _, tensor in pickler.tensors)
        self._reserve(end, pinned=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()  # whatever stream wrote them
        for place, tensor in pickler.tensors:
            self.view(place, tensor.dtype, tuple(tensor.shape)).copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        assert self._memory is not None
        self._memory[start:end] = file.getbuffer()
        return start, end

    def load(self, place: tuple[int, int], left_out: object = None) -> Any:
        """What `store` of the other process put there. Its tensors are that memory itself."""
        start, end = place
        size = os.fstat(self.descriptor).st_size
        if self._memory is None or len(self._memory) != size:
            self._memory = mmap.mmap(self.descriptor, size)
        return _Unpickler(self._memory[start:end], self, left_out).load()

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The memory at `start`, as a tensor with a storage of its own size."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)

    def _reserve(self, size: int, pinned: bool) -> None:
        have = 0 if self._memory is None else len(self._memory)
        if have < size:
            free = psutil.virtual_memory().available
            if free < size - have:
                raise OSError(
                    f"{size - have:,} more bytes of host memory are needed to save in the background, {free:,} are "
                    "free: use more processes, or remove --async-save"
                )
            self._unpin()
            os.posix_fallocate(self.descriptor, 0, size)  # an error here, where a write to it would kill the process
            self._memory = mmap.mmap(self.descriptor, size)
        if pinned and self._pinned is None:
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)
            if int(error):
                logger.warning("%s bytes of host memory cannot be pinned (%s): copies are slow", whole.numel(), error)
            else:
                self._pinned = whole

    def _unpin(self) -> None:
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr())
            self._pinned = None
