"""Merged datasets have the bytes that Megatron's builder gives; what does not belong together is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from yoco_megatron.corpus.merge import find_prefixes, merge, merged_prefix
from yoco_megatron.data.loss_masks import check_masks


def dataset(prefix: Path, seed: int, dtype: type = np.uint16, sha: str | None = None) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    generator = np.random.default_rng(seed)
    for length in generator.integers(1, 50, 30):
        builder.add_document(generator.integers(0, 60_000, length), [int(length)])
    builder.finalize(f"{prefix}.idx")
    if sha:
        report = {"documents": 30, "tokens": 1, "bytes": 100, "tokenizer": {"sha256": sha}}
        Path(f"{prefix}.json").write_text(json.dumps(report))
    return str(prefix)


def test_bytes_are_those_of_megatrons_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoco_megatron.corpus.idx_writer.BLOCK", 7)
    prefixes = [dataset(tmp_path / name, seed, sha="s") for seed, name in enumerate(("b", "a", "c"))]
    report = merge([*prefixes, prefixes[0]], str(tmp_path / "out" / "all"))
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=np.uint16)
    for prefix in [*prefixes, prefixes[0]]:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "megatron.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / "out" / f"all.{suffix}").read_bytes() == (tmp_path / f"megatron.{suffix}").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.bin", "all.idx", "all.json"]
    assert json.loads((tmp_path / "out" / "all.json").read_text()) == report
    assert (report["documents"], report["bytes"], report["tokenizer"]) == (120, 400, {"sha256": "s"})
    assert report["tokens"] == (tmp_path / "out" / "all.bin").stat().st_size // 2
    with pytest.raises(ValueError, match=r"--output-prefix: .*all\.idx exists"):
        merge(prefixes, str(tmp_path / "out" / "all"))


def test_names_are_those_of_preprocessing():
    parts = ["a/x_text_document", "b_text_document"]
    assert merged_prefix(parts, "out/all") == merged_prefix(parts, "out/all_text_document") == "out/all_text_document"
    assert merged_prefix(["x_text_document", "x_messages_document"], "all") == merged_prefix(["x", "y"], "all") == "all"


def test_folders_are_taken_by_name(tmp_path: Path) -> None:
    prefixes = [dataset(tmp_path / name, 1) for name in ("b", "a")]
    Path(prefixes[0]).mkdir()  # where training on it puts its cache
    assert find_prefixes([str(tmp_path), prefixes[0]]) == [*sorted(prefixes), prefixes[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--input .*empty holds no \.idx"):
        find_prefixes([str(tmp_path / "empty")])


def lengths(prefix: Path) -> list[int]:
    dataset = IndexedDataset(str(prefix))
    return dataset.sequence_lengths.tolist()


def masked(prefix: Path, seed: int) -> str:
    """A dataset with a loss mask beside it."""
    dataset(prefix, seed)
    builder = IndexedDatasetBuilder(f"{prefix}_loss_mask.bin", dtype=np.uint8)
    generator = np.random.default_rng(seed)
    for length in lengths(prefix):
        builder.add_document(generator.integers(0, 2, length), [length])
    builder.finalize(f"{prefix}_loss_mask.idx")
    return str(prefix)


def test_masks_are_merged_with_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoco_megatron.corpus.merge.BLOCK_BYTES", 64)
    (tmp_path / "in").mkdir()
    prefixes = [masked(tmp_path / "in" / name, seed) for seed, name in enumerate("ab")]
    assert find_prefixes([str(tmp_path / "in")]) == prefixes
    report = merge(prefixes, str(tmp_path / "all"))
    mask = b"".join(Path(f"{prefix}_loss_mask.bin").read_bytes() for prefix in prefixes)
    assert (tmp_path / "all_loss_mask.bin").read_bytes() == mask and len(mask) == report["tokens"]
    assert lengths(tmp_path / "all") == lengths(tmp_path / "all_loss_mask") and len(lengths(tmp_path / "all")) == 60
    assert report["loss_mask"]["learned_tokens"] == sum(mask)
    assert report["loss_mask"]["files"]["bin"]["sha256"] == hashlib.sha256(mask).hexdigest()
    check_masks([str(tmp_path / "all")])

    with pytest.raises(ValueError, match=r"in/a_loss_mask is the loss mask of .*in/a: give that one"):
        merge([f"{prefixes[0]}_loss_mask"], str(tmp_path / "mixed"))
    bare = dataset(tmp_path / "bare", 3)
    with pytest.raises(ValueError, match=r"--input: .*in/a has a loss mask, .*bare has none"):
        merge([bare, *prefixes], str(tmp_path / "mixed"))
    merge([bare], str(tmp_path / "all"), overwrite=True)  # the mask of the old tokens goes
    assert not list(tmp_path.glob("all_loss_mask*")) and not list(tmp_path.glob("*mixed*"))
    binary = tmp_path / "in" / "a_loss_mask.bin"
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a_loss_mask\.bin is shorter than its \.idx says"):
        merge(prefixes, str(tmp_path / "mixed"))
    binary.unlink()
    with pytest.raises(ValueError, match=r"a_loss_mask\.bin is missing"):
        merge(prefixes, str(tmp_path / "mixed"))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    one = dataset(tmp_path / "one", 1, sha="aaa")
    for name, more, error in (
        ("wide", {"dtype": np.int32}, r"one has dtype uint16, .*wide has int32"),
        ("other", {"sha": "bbb"}, r"one has tokenizer aaa, .*other has bbb"),
    ):
        with pytest.raises(ValueError, match=error):
            merge([one, dataset(tmp_path / name, 2, **more)], str(tmp_path / "out"))
    report = json.loads(Path(f"{one}.json").read_text())
    for name, end in (("ended", 0), ("endless", None)):
        dataset(tmp_path / name, 2, sha="aaa")
        report["tokenizer"]["eod"] = end
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"ended has end of document 0, .*endless has None; preprocess all with"):
        merge([str(tmp_path / "ended"), str(tmp_path / "endless")], str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"is one of the inputs"):
        merge([one], one, overwrite=True)
    with pytest.raises(ValueError, match=r"none\.idx is missing"):
        merge([one, str(tmp_path / "none")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
