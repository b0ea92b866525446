"""Seconds of a pipeline's step by its schedule, pass after pass: 1F1B, interleaved where ranks have several chunks.

Chunks of different lengths wait for each other, which sums over ranks do not show: at 32,768 tokens a layer of the
cross-decoder takes twice as long as one of the self-decoder.
"""

from collections.abc import Sequence

GROUPS = 6  # of micro-batches, a rank's number each, after which a step only repeats itself


def waiting_seconds(stages: Sequence[float], ranks: int, microbatches: int, forward: float) -> float:
    """That the slowest rank of a step waits for others, by the schedule.

    Args:
        stages: seconds of a micro-batch on each stage, forward and backward; stage g is on rank g % ranks. With several
            chunks a rank, micro-batches are a multiple of the ranks, as Megatron wants them.
        forward: share of a stage's seconds that its forward pass takes.
    """
    if ranks == 1:
        return 0.0
    longest = max(sum(stages[rank::ranks]) for rank in range(ranks))

    def of_first(count: int) -> float:
        return pipeline_seconds(stages, ranks, count, forward) - count * longest

    simulated = min(microbatches, GROUPS * ranks + microbatches % ranks)
    waiting = of_first(simulated)
    if simulated < microbatches:  # a group may still make up for an earlier one's, but all others do not
        waiting += max(0.0, waiting - of_first(simulated - ranks)) * (microbatches - simulated) / ranks
    return waiting


def about_waiting_seconds(stages: Sequence[float], ranks: int, microbatches: int, forward: float) -> float:
    """Nearly that: filling and emptying the pipeline, and half of what a chunk's stages differ by."""
    if ranks == 1:
        return 0.0
    totals = [sum(stages[rank::ranks]) for rank in range(ranks)]
    longest = max(totals)
    chunks = len(stages) // ranks
    together = sum(max(stages[first : first + ranks]) for first in range(0, len(stages), ranks))
    differing = microbatches * (together - longest) / 2 if chunks > 1 else 0.0
    return (sum(totals) - longest) / chunks + differing


def pipeline_seconds(stages: Sequence[float], ranks: int, microbatches: int, forward: float) -> float:
    """Of a step, from the first pass to the last; arguments as for `waiting_seconds`."""
    orders = [_order(rank, ranks, len(stages) // ranks, microbatches) for rank in range(ranks)]
    done: dict[tuple[bool, int, int], float] = {}  # (is it forward, stage, micro-batch): when it ends
    clock, at = [0.0] * ranks, [0] * ranks
    waiting = list(range(ranks))
    while waiting:
        before = sum(at)
        for rank in waiting:
            order = orders[rank]
            while at[rank] < len(order):
                ahead, chunk, batch = order[at[rank]]
                stage = chunk * ranks + rank
                needs = (True, stage - 1, batch) if ahead else (False, stage + 1, batch)
                first = stage == 0 if ahead else stage == len(stages) - 1
                if not first and needs not in done:
                    break
                start = clock[rank] if first else max(clock[rank], done[needs])
                clock[rank] = start + stages[stage] * (forward if ahead else 1 - forward)
                done[ahead, stage, batch] = clock[rank]
                at[rank] += 1
        waiting = [rank for rank in waiting if at[rank] < len(orders[rank])]
        assert sum(at) > before, "the schedule waits for itself"
    return max(clock)


def _order(rank: int, ranks: int, chunks: int, microbatches: int) -> list[tuple[bool, int, int]]:
    """Passes of a rank: (forward, chunk, micro-batch), as Megatron's schedules have them (core/pipeline_parallel)."""
    total = microbatches * chunks
    behind = ranks - rank - 1
    warm_up = min(total, behind if chunks == 1 else 2 * behind + (chunks - 1) * ranks)

    def nth(count: int, ahead: bool) -> tuple[bool, int, int]:
        if chunks == 1:
            return ahead, 0, count
        group, within = divmod(count, ranks * chunks)
        chunk, batch = divmod(within, ranks)
        return ahead, chunk if ahead else chunks - 1 - chunk, group * ranks + batch

    order = [nth(count, True) for count in range(warm_up)]
    for count in range(total - warm_up):
        order += [nth(warm_up + count, True), nth(count, False)]
    return order + [nth(count, False) for count in range(total - warm_up, total)]
