"""Damaged datasets are told from whole ones by their sizes alone, and token statistics match a count in memory."""

import json
import struct
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from yoco_megatron.data import check
from yoco_megatron.data.check import check_data_prefixes, count_ids, data_prefixes_from_args, unigram_entropy

RANDOM = np.random.default_rng(7)
DOCUMENTS = [RANDOM.integers(0, 90, size).tolist() for size in RANDOM.integers(1, 60, 37)]


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(params=[np.uint16, np.int32])
def prefix(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return write(tmp_path / "data_text_document", DOCUMENTS, request.param)


def problem(*prefixes: str) -> str:
    with pytest.raises(ValueError, match=r"^--data-path: ") as error:
        check_data_prefixes(list(prefixes))
    return str(error.value)


def test_whole_datasets_pass(prefix: str) -> None:
    check_data_prefixes([prefix, prefix])
    check_data_prefixes([])


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_missing_files_are_named(prefix: str, suffix: str) -> None:
    Path(f"{prefix}.{suffix}").unlink()
    assert f"{prefix}.{suffix} is missing; " in problem(prefix)


def test_missing_files_get_the_likely_fix(prefix: str, tmp_path: Path) -> None:
    assert "give the prefix without .bin" in problem(f"{prefix}.bin")
    assert f"did you mean {prefix}?" in problem(str(tmp_path / "data"))
    assert "tools/preprocess_data.py" in problem(str(tmp_path / "other"))
    # A list of odd length has prefixes alone.
    odd = data_prefixes_from_args(arguments(data_path=["30", prefix, prefix]))
    assert "30 is not a prefix: give W1 P1 W2 P2" in problem(*odd)


@pytest.mark.parametrize(("change", "state"), [(-1, "shorter"), (-1000, "shorter"), (1, "longer"), (2, "longer")])
def test_bin_of_another_size(prefix: str, change: int, state: str) -> None:
    path = Path(f"{prefix}.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0" * change)
    message = problem(prefix)
    assert f"{path} is {state} than its .idx says" in message
    assert f"not {len(whole):,})" in message


@pytest.mark.parametrize("kept", [9, 20, 33, 34, 100, -1])
def test_truncated_index(prefix: str, kept: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated" in problem(prefix)


@pytest.mark.parametrize(
    ("place", "content", "reason"),
    [
        (0, b"", "not the index"),
        (0, b"MMIDIDY", "not the index"),
        (9, b"\2", "version 2"),
        (17, b"\63", "dtype code 51"),
        (None, b"\0" * 99, "longer than its header says"),
    ],
    ids=["empty", "magic", "version", "dtype", "longer"],
)
def test_files_that_are_no_index(prefix: str, place: int | None, content: bytes, reason: str) -> None:
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    if place is None:
        path.write_bytes(whole + content)
    else:
        path.write_bytes(whole[:place] + content + whole[place + len(content) :] if content else b"")
    assert reason in problem(prefix)


def test_all_damaged_datasets_are_listed(prefix: str, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [])
    message = problem(prefix, str(tmp_path / "gone"), empty)
    assert f"{prefix}." not in message
    assert "gone.idx is missing" in message
    assert "empty.idx holds no documents" in message


def test_the_report_of_other_data_is_refused(prefix: str, tmp_path: Path) -> None:
    """An .idx or .bin that was copied over the old one, without its report."""
    from yoco_megatron.corpus.output_files import describe_files

    binary, index = (Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx"))
    report = {"files": describe_files(binary, index)}
    Path(f"{prefix}.json").write_text(json.dumps(report))
    check_data_prefixes([prefix])
    content = bytearray(binary.read_bytes())
    content[4] ^= 1
    binary.write_bytes(content)
    assert f"{prefix}.json describes another {prefix}.bin" in problem(prefix)
    write(Path(prefix), [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]])
    assert f"{prefix}.json describes another {prefix}.idx" in problem(prefix)
    Path(f"{prefix}.json").unlink()
    check_data_prefixes([prefix])


def test_other_ranks_read_headers_and_sizes_alone(prefix: str) -> None:
    check_data_prefixes([prefix], inside=False)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[40] ^= 1  # the length of document 1
    path.write_bytes(content)
    check_data_prefixes([prefix], inside=False)
    assert "begins at byte" in problem(prefix)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is shorter than"):
        check_data_prefixes([prefix], inside=False)


def test_terabytes_are_checked_without_reading_them(tmp_path: Path) -> None:
    """Three hundred sequences of 2^31 - 1 tokens: 2.6 TB, as sparse files."""
    sequences, length, size = 300, 2**31 - 1, 4
    lengths = np.full(sequences, length, dtype=np.int32)
    pointers = np.arange(sequences, dtype=np.int64) * length * size
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, DType.code_from_dtype(np.int32), sequences, sequences + 1)
    content = header + lengths.tobytes() + pointers.tobytes() + np.arange(sequences + 1).tobytes()
    (tmp_path / "big.idx").write_bytes(content)
    with (tmp_path / "big.bin").open("wb") as stream:
        stream.truncate(sequences * length * size)
    check_data_prefixes([str(tmp_path / "big")])
    with (tmp_path / "big.bin").open("r+b") as stream:
        stream.truncate(sequences * length * size - 4)
    assert "shorter" in problem(str(tmp_path / "big"))


def arguments(**given: object) -> Namespace:
    paths = [f"{part}data_path" for part in ("", "train_", "valid_", "test_")]
    return Namespace(**(dict.fromkeys([*paths, "data_args_path", "per_split_data_args_path"]) | given))


def test_prefixes_are_collected_from_every_flag(tmp_path: Path) -> None:
    assert data_prefixes_from_args(arguments()) == []
    assert data_prefixes_from_args(arguments(data_path=["a"])) == ["a"]
    assert data_prefixes_from_args(arguments(data_path=["a", "b"])) == ["a", "b"]
    assert data_prefixes_from_args(arguments(data_path=["30", "a", "70", "b", "1", "a"])) == ["a", "b"]
    assert data_prefixes_from_args(arguments(data_path=["a"], mock_data=True)) == []
    split = arguments(train_data_path=["1", "a", "2", "b"], valid_data_path=["c"])
    assert data_prefixes_from_args(split) == ["a", "b", "c"]

    listed = tmp_path / "blend.txt"
    listed.write_text("0.5 a\n0.5 b\n")
    assert data_prefixes_from_args(arguments(data_args_path=str(listed))) == ["a", "b"]
    per_split = tmp_path / "blend.json"
    per_split.write_text(json.dumps({"train": "1 a 2 b", "valid": ["c"], "test": None}))
    assert data_prefixes_from_args(arguments(per_split_data_args_path=str(per_split))) == ["a", "b", "c"]


def test_unreadable_lists_are_refused_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--valid-data-path"):
        data_prefixes_from_args(arguments(train_data_path=["a"], valid_data_path=[]))
    with pytest.raises(ValueError, match=r"^--data-args-path .*gone"):
        data_prefixes_from_args(arguments(data_args_path=str(tmp_path / "gone")))
    (tmp_path / "partial.json").write_text('{"train": "a"}')
    with pytest.raises(ValueError, match=r"valid"):
        data_prefixes_from_args(arguments(per_split_data_args_path=str(tmp_path / "partial.json")))


def test_entropy_of_known_frequencies(tmp_path: Path) -> None:
    assert unigram_entropy(count_ids(write(tmp_path / "same", [[5, 5], [5]]))) == 0
    assert unigram_entropy(count_ids(write(tmp_path / "eight", [[0, 1, 2, 3], [4, 5, 6, 7]]))) == pytest.approx(
        np.log(8)
    )
    half = unigram_entropy(count_ids(write(tmp_path / "half", [[9, 9, 9, 9, 1, 1, 2, 3]])))
    assert half == pytest.approx(1.75 * np.log(2))


@pytest.mark.parametrize("part", [None, "train", "valid", "test"])
def test_entropy_of_a_part_is_that_of_megatrons_documents(
    prefix: str, part: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "BLOCK_TOKENS", 13)
    split = "7,2,1"
    tokenizer = SimpleNamespace(pad=99, eod=0, eos=0, vocab_size=90, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, blend=([prefix], None), split=split, tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    parts = BlendedMegatronDatasetBuilder(GPTDataset, [5, 5, 5], lambda: True, config).build()
    used = range(len(DOCUMENTS))
    if part is not None:
        used = parts[["train", "valid", "test"].index(part)].indices
    counts = np.bincount([token for document in used for token in DOCUMENTS[document]])
    shares = counts[counts > 0] / counts.sum()
    entropy = unigram_entropy(count_ids(prefix, split if part else None, part))
    assert entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)


@pytest.mark.parametrize(("dtype", "number"), [(np.uint16, 90), (np.int32, -1), (np.int32, 2**31 - 1)])
def test_counted_ids_are_those_of_the_vocabulary(
    tmp_path: Path, dtype: type[np.integer], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ids without end no table is made."""
    monkeypatch.setattr(check, "BLOCK_TOKENS", 13)
    prefix = write(tmp_path / "d", [*DOCUMENTS, [1, 2, number]], dtype)
    with pytest.raises(ValueError, match=rf"d: document 37 holds the token id {number}, and the vocabulary ends at 89"):
        count_ids(prefix, limit=90)
    if number == 90:
        assert len(count_ids(prefix)) == 91
    else:
        with pytest.raises(ValueError, match=rf"document 37 holds the token id {number}, and"):
            count_ids(prefix)


def test_parts_that_are_not_there(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"part test .* holds no tokens"):
        count_ids(prefix, "9,1,0", "test")
    with pytest.raises(ValueError, match=r"--part dev"):
        count_ids(prefix, "9,1,0", "dev")
    with pytest.raises(ValueError, match=r"go together"):
        count_ids(prefix, "9,1,0")


def test_parts_without_a_document_are_refused(prefix: str) -> None:
    """GPTDataset adds epochs of nothing until it has enough."""
    check.check_split([prefix], "1,0,0")
    with pytest.raises(ValueError, match=r"--split 969, 30, 1: none of the \d+ documents of .* the part (valid|test)"):
        check.check_split([prefix], "969, 30, 1")
    for split in ("a,b", "0,0,0", "1,1,1,1"):
        with pytest.raises(ValueError, match=rf"--split {split}: give the shares"):
            check.check_split([prefix], split)
