"""Reading ahead in the data of one call of a schedule."""

import torch.distributed as dist
from support.worlds import run_world

from yoco_megatron.parallel.host_group import host_group
from yoco_megatron.training.micro_batches import MaskedMicroBatches
from yoco_megatron.training.query_positions import PositionCounts

FOUND = {
    "a": (((0, 3),), PositionCounts(8, 2, 3, 6)),
    "b": (None, PositionCounts(8, 8, 8, 36)),
    "c": ((), PositionCounts()),
}


def test_a_sample_is_read_when_somebody_first_asks() -> None:
    samples = iter("abc")
    reader = MaskedMicroBatches(samples, FOUND.__getitem__)
    assert reader.runs(1) is None and reader.runs(0) == ((0, 3),)
    assert next(reader) == ("a", ((0, 3),)) and next(reader) == ("b", None)
    assert reader.runs(0) == ((0, 3),), "for its gradient"
    assert next(samples) == "c", "not read ahead of need"
    assert reader.counts() == PositionCounts(16, 10, 11, 42)


def _read() -> list:
    rank = dist.get_rank()
    reader = MaskedMicroBatches(iter("ab") if rank == 0 else None, FOUND.__getitem__, host_group(dist.group.WORLD))
    return [reader.runs(1), next(reader), next(reader), reader.counts()]


def test_others_learn_from_the_first_rank() -> None:
    first, second = run_world(2, _read)
    assert first == [None, ("a", ((0, 3),)), ("b", None), PositionCounts(16, 10, 11, 42)]
    assert second == [None, (None, ((0, 3),)), (None, None), PositionCounts(16, 10, 11, 42)]
