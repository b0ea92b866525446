"""How many bytes of tensors live, and the most that ever did: what a GPU's allocator would have to hold."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


class LiveBytes:
    """Bytes of the storages of the tensors that are shown to `see`, from their birth to their death.

    A tensor on "meta" has no bytes.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}

    def see(self, tensor: Tensor) -> None:
        """Count its storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self._sizes:
            return
        self._set(key, storage.nbytes(), weakref.ref(storage, lambda _: self._set(key, 0, None)))

    def _set(self, key: int, size: int, storage: weakref.ref | None) -> None:
        before, known = self._sizes.pop(key, (0, None))
        if storage is not None or known is not None:
            self.now += size - before
            self.peak = max(self.peak, self.now)
        if storage is not None:
            self._sizes[key] = size, storage

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """See storages that are freed and filled again (`UntypedStorage.resize_`)."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if known := self._sizes.get(storage._cdata):
                self._set(storage._cdata, size, known[1])
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield
