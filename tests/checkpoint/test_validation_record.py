"""Validation losses beside checkpoints."""

import pytest

from yoco_megatron.checkpoint import validation_record
from yoco_megatron.utils.small_files import BadFile


def test_the_last_one_of_a_checkpoint(tmp_path):
    assert validation_record.of_checkpoint(tmp_path, 10) is None
    validation_record.add(tmp_path, 4, "", {"loss": 4.0})
    validation_record.add(tmp_path, 8, "code", {"loss": 3.0})
    validation_record.add(tmp_path, 8, "wiki", {"loss": 2.0})
    assert validation_record.of_checkpoint(tmp_path, 7) == (4, {"": {"loss": 4.0}})
    assert validation_record.of_checkpoint(tmp_path, 8) == (8, {"code": {"loss": 3.0}, "wiki": {"loss": 2.0}})
    validation_record.add(tmp_path, 6, "", {"loss": 3.5})  # the run went back
    assert validation_record.of_checkpoint(tmp_path, 99) == (6, {"": {"loss": 3.5}})


def test_a_damaged_file(tmp_path):
    (tmp_path / validation_record.FILE_NAME).write_text('{"4": {"": 3}}')
    with pytest.raises(BadFile, match="remove it"):
        validation_record.of_checkpoint(tmp_path, 4)


def test_what_is_not_finite_is_left_out(tmp_path):
    validation_record.add(tmp_path, 4, "", {"loss": 4.0})
    validation_record.add(tmp_path, 8, "", {"loss": float("nan"), "perplexity": float("inf")})
    assert validation_record.of_checkpoint(tmp_path, 99) == (4, {"": {"loss": 4.0}})
