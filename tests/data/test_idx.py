"""Every number of an .idx is checked, in blocks: what is damaged is refused, with the document's number."""

import struct
from pathlib import Path

import numpy as np
import pytest

from yoco_megatron.data import idx
from yoco_megatron.data.idx import IndexContent, check_index

COUNT = 40
LENGTHS = np.random.default_rng(5).integers(0, 30, COUNT).astype("<i4")
LENGTHS[7], LENGTHS[8] = 0, 12  # an empty document is none the worse
POINTERS = idx.HEADER.size + 4 * COUNT
DOCUMENTS = POINTERS + 8 * COUNT


def write(folder: Path, code: int = 8, size: int = 2) -> Path:
    """A dataset of COUNT documents; returns its .idx."""
    ends = size * np.cumsum(LENGTHS, dtype="<i8")
    header = idx.HEADER.pack(idx.MAGIC, 1, code, COUNT, COUNT + 1)
    content = header + LENGTHS.tobytes() + (ends - size * LENGTHS).tobytes() + np.arange(COUNT + 1).tobytes()
    (folder / "d.idx").write_bytes(content)
    (folder / "d.bin").write_bytes(bytes(int(ends[-1])))
    return folder / "d.idx"


def read(path: Path) -> IndexContent:
    return check_index(path, path.with_suffix(".bin"))


def damaged(path: Path, place: int, form: str, value: int) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    path.write_bytes(content)
    return path


@pytest.fixture(params=[1, 7, 1 << 20], ids="blocks of {}".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "BLOCK_DOCUMENTS", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("code", "size"), [(8, 2), (4, 4), (5, 8)])
def test_whole(tmp_path: Path, code: int, size: int) -> None:
    found = read(write(tmp_path, code, size))
    assert (found.tokens, found.longest) == (LENGTHS.sum(), LENGTHS.max())
    assert (found.header.sequences, found.header.dtype.itemsize) == (COUNT, size)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("place", "form", "value", "error"),
    [
        (idx.HEADER.size + 4 * 5, "<i", -1, "document 5 has the length -1"),
        (idx.HEADER.size + 4 * 39, "<i", -(2**31), "document 39 has the length -2147483648"),
        (
            idx.HEADER.size + 4 * 8,
            "<i",
            2**31 - 1,
            r"(document 9 begins at byte \d+ of the \.bin, and not at 4,294,|shorter)",
        ),
        (idx.HEADER.size + 4 * 39, "<i", 99, r"is shorter than its \.idx says"),
        (POINTERS, "<q", 2, "document 0 begins at byte 2 of the .bin, and not at 0"),
        (POINTERS + 8 * 7, "<q", -8, "document 7 begins at byte -8"),
        (POINTERS + 8 * 39, "<q", 2**62, "document 39 begins at byte 4,611,686,018,427,387,904"),
        (DOCUMENTS, "<q", 1, "document index 0 is 1: they rise from 0 to the 40 documents"),
        (DOCUMENTS + 8 * 20, "<q", -1, "document index 20 is -1"),
        (DOCUMENTS + 8 * 20, "<q", -(2**63), "document index 20 is -9,"),
        (DOCUMENTS + 8 * 20, "<q", 18, "document index 20 is 18"),
        (DOCUMENTS + 8 * 20, "<q", 21, r"index of sentences \(document 19 has 2\)"),
        (DOCUMENTS + 8 * 20, "<q", 2**40, "document index 20 is 1,099,"),
        (DOCUMENTS + 8 * 40, "<q", 39, "end at 39 of 40 documents"),
        (17, "<B", 6, "tokens of float64"),
        (18, "<Q", 2**63, "is truncated"),
        (26, "<Q", 2**64 - 1, "is truncated"),
    ],
)
def test_each_number_is_checked(tmp_path: Path, place: int, form: str, value: int, error: str) -> None:
    with pytest.raises(ValueError, match=rf"d\.(idx|bin).*{error}.*again|d\.idx is an {error}"):
        read(damaged(write(tmp_path), place, form, value))


def test_two_errors_that_cancel_out_in_the_sum(tmp_path: Path) -> None:
    """The last pointer, the last length and the size of the .bin are right: all that was looked at before."""
    path = write(tmp_path)
    for document, change in ((10, 3), (11, -3)):
        damaged(path, idx.HEADER.size + 4 * document, "<i", int(LENGTHS[document]) + change)
    with pytest.raises(ValueError, match="document 11 begins at byte"):
        read(path)


def test_parts_of_empty_documents(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert not idx.holds_tokens(path, 7, 8)
    assert idx.holds_tokens(path, 7, 9)
    assert not idx.holds_tokens(path, 3, 3)
