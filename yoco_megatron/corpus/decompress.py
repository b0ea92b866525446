"""Transparent decompression of gzip, bzip2, xz and zstd files, detected by magic bytes."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Buffer, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A skippable frame, which holds no data; pzstd begins with one.
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")


def _damaged() -> Iterator[type[Exception]]:
    """Exceptions with which the decompressors, optional ones included, report a damaged file."""
    yield from (OSError, EOFError, lzma.LZMAError, zlib.error)
    with contextlib.suppress(ImportError):
        import zstandard

        yield zstandard.ZstdError
    with contextlib.suppress(ImportError):
        import pyarrow

        yield pyarrow.ArrowException


DAMAGED = tuple(_damaged())


def decompressed(raw: BinaryIO) -> BinaryIO:
    """The decompressed content of `raw`, or `raw` itself; several members or frames in a row are one stream.

    Raises:
        EOFError: an empty file with the suffix of a compressed one.
        ValueError: zstd without the zstandard package.
    """
    magic = raw.read(6)
    raw.seek(0)
    if not magic and Path(raw.name).suffix.lower() in COMPRESSED_SUFFIXES:
        raise EOFError("it is empty: even compressed empty files have some bytes")
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if magic.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(raw), 1 << 20)
    if magic == b"\xfd7zXZ\x00":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 20)
    if magic.startswith(ZSTD_MAGIC) or ZSTD_SKIPPABLE.match(magic):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"--input {raw.name} is compressed with zstd: pip install zstandard") from None
        return io.BufferedReader(_BlockStream(_zstd_blocks(raw, zstandard.ZstdDecompressor().decompressobj)), 1 << 20)
    return raw


class _BlockStream(io.RawIOBase):
    """A raw stream over an iterator of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = block
        size = min(len(view), len(self.rest))
        view[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _zstd_blocks(raw: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed blocks of a zstd file. The library's own stream does not notice a file that ends inside a frame."""
    compressed = raw.read(1 << 17)
    while compressed:
        frame = new_frame()
        while not frame.eof:
            if not compressed:
                raise EOFError("the file ends inside a zstd frame")
            yield frame.decompress(compressed)
            compressed = frame.unused_data if frame.eof else raw.read(1 << 17)
        compressed = compressed or raw.read(1 << 17)


def skip(stream: BinaryIO, size: int) -> None:
    """Skip `size` bytes; a compressed stream must be decompressed up to there."""
    if stream.seekable():
        stream.seek(size)
        return
    while size:
        size -= len(stream.read(min(size, 1 << 20))) or size
