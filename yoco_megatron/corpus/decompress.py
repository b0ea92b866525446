"""Files packed with gzip, bzip2, xz or zstd, told by their first bytes, as streams of what they hold."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A frame that holds no data, with which pzstd begins.
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")


def _damaged() -> Iterator[type[Exception]]:
    """How the unpackers say that a file is not whole, optional ones among them."""
    yield from (OSError, EOFError, lzma.LZMAError, zlib.error)
    with contextlib.suppress(ImportError):
        import zstandard

        yield zstandard.ZstdError
    with contextlib.suppress(ImportError):
        import pyarrow

        yield pyarrow.ArrowException


DAMAGED = tuple(_damaged())


def unpacked(raw: BinaryIO) -> BinaryIO:
    """`raw`, or what it holds packed; many members or frames one after another are one stream."""
    magic = raw.read(6)
    raw.seek(0)
    if not magic and Path(raw.name).suffix.lower() in PACKED_SUFFIXES:
        raise EOFError("it is empty, which no packer makes of anything")
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
            raise ValueError(f"--input {raw.name} is packed with zstd: pip install zstandard") from None
        return io.BufferedReader(_Chunks(_zstd_pieces(raw, zstandard.ZstdDecompressor().decompressobj)), 1 << 20)
    return raw


class _Chunks(io.RawIOBase):
    """A stream of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.left:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.left = piece
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size


def _zstd_pieces(raw: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """What a zstd file holds. The library's own stream takes a file that ends inside a frame for a whole one."""
    packed = raw.read(1 << 17)
    while packed:
        frame = new_frame()
        while not frame.eof:
            if not packed:
                raise EOFError("the file ends inside a zstd frame")
            yield frame.decompress(packed)
            packed = frame.unused_data if frame.eof else raw.read(1 << 17)
        packed = packed or raw.read(1 << 17)


def skip(stream: BinaryIO, size: int) -> None:
    """Go on by `size` bytes; a packed stream has to be unpacked up to there."""
    if stream.seekable():
        stream.seek(size)
        return
    while size:
        size -= len(stream.read(min(size, 1 << 20))) or size
