"""From a command line to the arguments of a run, as one of any number of processes."""

import os

import pytest

from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.startup import arguments

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data", "--train-iters", "9", "--lr", "1e-3"]


PIPELINE = ["--pipeline-model-parallel-size", "2", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def test_a_tool_parses_as_the_first_process_of_the_smallest_world():
    before = dict(os.environ)
    with pytest.raises(ValueError, match="1 processes cannot be divided"):
        arguments.parse([*MINIMAL, *PIPELINE])
    args = arguments.parse_anywhere([*MINIMAL, *PIPELINE])
    assert (args.world_size, args.rank) == (2, 0)
    assert dict(os.environ) == before


def test_a_job_is_checked_for_its_processes():
    """The login node has neither their number nor a GPU."""
    args, plan = arguments.parse_for_job([*MINIMAL, *PIPELINE], 4)
    assert args.world_size == 4 and args.padded_vocab_size == 128
    assert plan == StagePlan((0, 2, 4), 2) and args.pipeline_model_parallel_layout == "Ett|ttL"
    args, plan = arguments.parse_for_job([*MINIMAL, *PIPELINE[2:]], 4)
    assert args.padded_vocab_size == 128 and plan is None
    with pytest.raises(ValueError, match="--tokenizer-type"):
        arguments.parse_for_job(MINIMAL, 4)
