"""A loss mask that is not whole, or of other data, is one error before training; never one that is silently missing."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.datasets import write

from yoco_megatron.data.check import index_of
from yoco_megatron.data.loss_masks import check_masks
from yoco_megatron.data.token_sample import sample_tokens

DOCUMENTS = [np.arange(size) for size in (4, 7, 0, 5)]
MASKS = [np.arange(size) % 2 for size in (4, 7, 0, 5)]
WHOLE = ["--split", "1,0,0", "--eval-iters", "0"]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """With the report that preprocessing writes."""
    prefix = write(tmp_path / "d", DOCUMENTS, loss_masks=MASKS)
    sampled = sample_tokens(Path(f"{prefix}_loss_mask.bin"), np.dtype(np.uint8)).sha256
    files = {
        "bin": {"sha256": "not compared", "sampled_sha256": sampled},
        "idx": {"sha256": index_of(f"{prefix}_loss_mask").sha256},
    }
    Path(f"{prefix}.json").write_text(json.dumps({"loss_mask": {"files": files}}))
    return prefix


def problem(prefix: str, inside: bool = True) -> str:
    with pytest.raises(ValueError, match=rf"^--data-path: {prefix}") as error:
        check_masks([prefix], inside=inside)
    return str(error.value)


@pytest.mark.parametrize("inside", [True, False])
def test_a_whole_mask_or_none_passes(prefix: str, inside: bool, tmp_path: Path) -> None:
    check_masks([prefix, write(tmp_path / "plain", DOCUMENTS)], inside=inside)
    Path(f"{prefix}.json").unlink()
    check_masks([prefix], inside=inside)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("missing", [["bin"], ["idx"], ["bin", "idx"]])
def test_what_is_missing_of_a_mask_is_named(prefix: str, missing: list[str], inside: bool) -> None:
    """Without the report a dataset without both files has no mask: the report is the only one to know better."""
    for suffix in missing:
        Path(f"{prefix}_loss_mask.{suffix}").unlink()
    assert "is missing: copy d_loss_mask.idx and d_loss_mask.bin again" in problem(prefix, inside)


@pytest.mark.parametrize("inside", [True, False])
def test_another_number_of_documents(prefix: str, inside: bool) -> None:
    write(Path(f"{prefix}_loss_mask"), MASKS[:2], np.uint8)
    assert f"d_loss_mask.idx has 2 documents, and {prefix}.idx 4" in problem(prefix, inside)


def test_other_lengths(prefix: str) -> None:
    write(Path(f"{prefix}_loss_mask"), [*MASKS[:1], MASKS[0], [1, 1, 1], MASKS[3]], np.uint8)
    assert f"document 1 has 4 numbers, and 7 tokens in {prefix}.idx: copy" in problem(prefix)


@pytest.mark.parametrize("inside", [True, False])
def test_another_type_or_a_cut_file(prefix: str, inside: bool) -> None:
    whole = Path(f"{prefix}_loss_mask.bin").read_bytes()
    Path(f"{prefix}_loss_mask.bin").write_bytes(whole[:-1])
    assert "d_loss_mask.bin is shorter than its .idx says" in problem(prefix, inside)
    write(Path(f"{prefix}_loss_mask"), MASKS, np.int32)
    assert "d_loss_mask.idx holds int32, and a loss mask is of uint8" in problem(prefix, inside)


def test_another_mask_than_the_reports_and_other_numbers(prefix: str) -> None:
    write(Path(f"{prefix}_loss_mask"), [1 - mask for mask in MASKS], np.uint8)
    assert f"{prefix}.json describes another {prefix}_loss_mask.bin" in problem(prefix)
    Path(f"{prefix}.json").unlink()
    check_masks([prefix])
    write(Path(f"{prefix}_loss_mask"), [2 * mask for mask in MASKS], np.uint8)
    assert "d_loss_mask.bin holds the number 2, and a loss mask 0 and 1" in problem(prefix)


def test_a_mask_without_a_loss(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{prefix}.json").unlink()
    zeros = np.zeros(7, np.uint8)
    write(Path(f"{prefix}_loss_mask"), [zeros[:4], zeros, zeros[:0], zeros[:5]], np.uint8)
    assert "d_loss_mask.bin is 0 everywhere, so that nothing is learned" in problem(prefix)
    # Rare ones, between the blocks of the sample.
    monkeypatch.setattr("yoco_megatron.data.token_sample.BLOCKS", 2)
    monkeypatch.setattr("yoco_megatron.data.token_sample.BLOCK_BYTES", 1)
    write(Path(f"{prefix}_loss_mask"), [zeros[:4], [0, 0, 0, 1, 0, 0, 0], zeros[:0], zeros[:5]], np.uint8)
    check_masks([prefix])


def test_a_damaged_index(prefix: str) -> None:
    path = Path(f"{prefix}_loss_mask.idx")
    content = bytearray(path.read_bytes())
    content[34 + 4 * 4 + 8] ^= 1  # the second pointer
    path.write_bytes(content)
    assert "document 1 begins at byte" in problem(prefix)
