"""Where to cut a YOCO into pipeline stages, so that the slowest stage is as fast as possible.

Layers of the two halves do not cost the same. `costs.stage_time` estimates the seconds of each part; the planner finds
contiguous cuts.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise

from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import Seconds, stage_gflop, stage_parameters, stage_seconds
from yoco_megatron.costs.traffic import boundary_bytes
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.utils.errors import require


def plan_cuts(
    num_layers: int,
    split_layer: int,
    ranks: int,
    model_chunks: int,
    seconds: Seconds,
    kv_sources: Sequence[int] = (),
) -> list[int]:
    """Layers per stage: contiguous, at least one each; minimises the busiest rank's time, then the longest stage's.

    With one chunk a rank this is exact. With several, layers move between neighbouring stages while that helps the
    busiest rank, from the cuts with the shortest longest stage, from those that fill stage after stage to its length,
    and from even ones.

    Raises:
        ValueError: more stages than layers.
    """
    stages = ranks * model_chunks
    require(
        stages <= num_layers,
        f"{stages} pipeline stages (ranks x virtual stages) are more than --num-layers {num_layers}: use a smaller "
        "--pipeline-model-parallel-size or fewer virtual stages",
    )

    of_layers = layer_seconds(num_layers, split_layer, seconds, kv_sources)
    sums = [0.0, *accumulate(of_layers)]

    def stage_time(first: int, last: int) -> float:
        return sums[last] - sums[first]

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(longest stage, sum of squares, counts) of layers [first, num_layers) in `left` stages."""
        if left == 1:
            own = stage_time(first, num_layers)
            return own, own * own, (num_layers - first,)
        options = []
        for last in range(first + 1, num_layers - left + 2):
            own = stage_time(first, last)
            longest, squares, counts = best(last, left - 1)
            options.append((max(own, longest), squares + own * own, (last - first, *counts)))
        return min(options)

    shortest = list(best(0, stages)[2])
    if model_chunks == 1:
        return shortest
    even = [num_layers * (g + 1) // stages - num_layers * g // stages for g in range(stages)]
    filled = filled_cuts(of_layers, stages)
    return _balance_ranks([shortest, filled, even], ranks, stage_time)


def layer_seconds(num_layers: int, split_layer: int, seconds: Seconds, kv_sources: Sequence[int] = ()) -> list[float]:
    """Of each layer, with what stands before the first, behind the sources of K,V (of none, between the halves) and
    behind the last."""
    of_layers = [seconds["self_decoder" if layer < split_layer else "cross_decoder"] for layer in range(num_layers)]
    of_layers[0] += seconds["embedding"]
    for source in kv_sources or (split_layer,):
        of_layers[max(0, source - 1)] += seconds["shared_kv"]
    of_layers[-1] += seconds["output_layer"] + seconds.get("mtp", 0.0)
    return of_layers


def filled_cuts(of_layers: Sequence[float], stages: int) -> list[int]:
    """Layers per stage, filled one after the other up to a length that bisection makes nearly as short as can be: in a
    thousandth of the time that the exact cuts take."""
    num_layers = len(of_layers)

    def cuts(longest: float) -> tuple[int, ...]:
        """Where no stage is longer; but as many stages as wanted, as far as there are layers."""
        starts, held = [0], 0.0
        for layer, own in enumerate(of_layers):
            if layer > starts[-1] and (held + own > longest or num_layers - layer <= stages - len(starts)):
                starts.append(layer)
                held = 0.0
            held += own
        return (*starts, num_layers)

    low, high = max(max(of_layers), sum(of_layers) / stages), sum(of_layers)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if len(cuts(middle)) <= stages + 1 else (middle, high)
    return [stop - start for start, stop in pairwise(cuts(high))]


def _balance_ranks(starts: list[list[int]], ranks: int, stage_time: Callable[[int, int], float]) -> list[int]:
    """Move single layers between neighbours while (busiest rank, longest stage, unevenness) gets smaller."""

    def cost(counts: list[int]) -> tuple[float, float, float]:
        stages = [stage_time(first, last) for first, last in pairwise([0, *accumulate(counts)])]
        time_per_rank = [sum(stages[rank::ranks]) for rank in range(ranks)]
        return max(time_per_rank), max(stages), sum(t * t for t in time_per_rank)

    def improve(counts: list[int]) -> list[int]:
        while True:
            cheapest = min((counts, *_moves(counts)), key=cost)
            if cost(cheapest) >= cost(counts):
                return counts
            counts = cheapest

    return min((improve(counts) for counts in starts), key=cost)


def _moves(counts: list[int]) -> Iterator[list[int]]:
    """All cuts that differ by one layer across one boundary."""
    for left, right in pairwise(range(len(counts))):
        for giver, taker in ((left, right), (right, left)):
            if counts[giver] > 1:
                moved = counts.copy()
                moved[giver] -= 1
                moved[taker] += 1
                yield moved


def bubbles(per_stage: list[float], ranks: int, num_microbatches: int) -> list[float]:
    """Expected idle share of every pipeline rank, 1F1B or interleaved.

    One step lasts m T_max + (sum of the other ranks' times) / V, with T the time of a micro-batch on a rank and V
    chunks a rank: for equal stages (P-1) / (m V + P-1), the known figure.
    """
    chunks = len(per_stage) // ranks
    time_per_rank = [sum(per_stage[rank::ranks]) for rank in range(ranks)]
    longest = max(time_per_rank)
    total = num_microbatches * longest + (sum(time_per_rank) - longest) / chunks
    return [1 - num_microbatches * own / total for own in time_per_rank]


def table(
    plan: StagePlan,
    shape: ModelShape,
    seconds: Seconds,
    ranks: int,
    num_microbatches: int,
    micro_batch_size: int,
    bytes_per_value: int,
) -> str:
    """What the planner prints: a line a stage, as text."""
    parts = plan.parts()
    times = [stage_seconds(held, seconds) for held in parts]
    idle = bubbles(times, ranks, num_microbatches)
    tokens = micro_batch_size * shape.seq_length

    def megabytes(g: int) -> float:
        """Of the tensor that enters stage g."""
        size = boundary_bytes(shape, tokens, bytes_per_value, len(plan.kv_arriving(g)), plan.memory_arrives(g))
        return size / 1e6 if 0 < g < plan.count else 0.0

    lines = [
        f"pipeline: {plan.count} stages on {ranks} ranks, {num_microbatches} micro-batches of {micro_batch_size} x "
        f"{shape.seq_length} tokens (bytes and parameters before tensor and context parallelism)",
        f"{'stage':>5} {'rank':>4} {'self':>4} {'cross':>5} {'also':<14} {'parameters':>13} {'GFLOP/token':>11} "
        f"{'time':>5} {'recv MB':>8} {'send MB':>8} {'bubble':>6}",
    ]
    for g in range(plan.count):
        stage = plan.stage(g)
        n_self, n_cross = stage.split(plan.split_layer)
        held = {"embed": stage.pre_process, "K,V": bool(stage.kv_sources), "head": stage.post_process}
        also = " ".join(name for name, here in held.items() if here)
        lines.append(
            f"{g:>5} {g % ranks:>4} {n_self:>4} {n_cross:>5} {also:<14} "
            f"{stage_parameters(parts[g], shape):>13,} {stage_gflop(parts[g], shape):>11.3g} "
            f"{times[g] / max(times):>5.0%} {megabytes(g):>8.2f} {megabytes(g + 1):>8.2f} {idle[g % ranks]:>6.1%}"
        )
    return "\n".join(lines)
