"""Positions that are computed for a micro-batch's loss masks, and what they count."""

from argparse import Namespace

import torch

from yoco_megatron.training.query_positions import PositionCounts, masked_query_runs

FLAGS = dict(tensor_model_parallel_size=2, context_parallel_size=1, sequence_parallel=False, fp8=None)


def sample() -> dict[str, torch.Tensor]:
    """Two sequences of 1,024 tokens."""
    loss_mask = torch.zeros(2, 1024)
    loss_mask[0, 300:400] = 1
    loss_mask[1, 350:356] = 1
    loss_mask[1, 900:928] = 0.5
    return {"loss_mask": loss_mask}


def test_union_of_the_samples() -> None:
    runs, counts = masked_query_runs(sample(), Namespace(**FLAGS))
    assert runs == ((300, 400), (900, 928))
    keys = sum(range(301, 401)) + sum(range(901, 929))
    assert counts == PositionCounts(2048, 100 + 6 + 28, 2 * 128, 2 * keys)


def test_documents_see_their_own_keys() -> None:
    ends = torch.tensor([[0, 350, 1024, 1024], [0, 910, 920, 1024]], dtype=torch.int32)
    _, counts = masked_query_runs(sample() | {"cu_seqlens": ends}, Namespace(**FLAGS))
    first = sum(range(301, 351)) + sum(range(1, 51)) + sum(range(551, 579))
    second = sum(range(301, 401)) + sum(range(901, 911)) + sum(range(1, 11)) + sum(range(1, 9))
    assert counts.keys == first + second


def test_rows_that_ranks_and_fp8_can_share() -> None:
    shared = dict(context_parallel_size=3, sequence_parallel=True, fp8="hybrid")
    runs, counts = masked_query_runs(sample(), Namespace(**FLAGS | shared))
    assert counts.computed == 2 * 192 and sum(stop - start for start, stop in runs) == 192
