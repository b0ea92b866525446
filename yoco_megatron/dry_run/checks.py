"""Whether the ranks of a world fit together, and each of them the formulas of `costs`."""

from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, zip_longest
from math import prod
from operator import attrgetter, sub

from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token
from yoco_megatron.costs.memory import rank_memories
from yoco_megatron.costs.recompute import recomputed_flops_per_token
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import Parts, memory_sources, shapes_of_ranks
from yoco_megatron.dry_run.fake_rank import RankRecord, Shard
from yoco_megatron.dry_run.ledger import Call
from yoco_megatron.dry_run.mesh import Mesh, Place
from yoco_megatron.model.init import is_of_expert

# Tensor parallelism leaves weights of norms whole; and Megatron pads buffers, which only tiny models notice.
TOLERANCE, PADDING = 0.025, 4096


def mismatched_calls(records: Sequence[RankRecord]) -> Iterator[str]:
    """What two ranks do together, each has to do in the same order: collectives, and sends with their receives."""
    for first, second in combinations(records, 2):
        for what, ours, theirs in (
            ("collectives", _shared(first, second), _shared(second, first)),
            ("sends", _one_way(first, "send", second), _one_way(second, "receive", first)),
            ("receives", _one_way(first, "receive", second), _one_way(second, "send", first)),
        ):
            for number, (one, other) in enumerate(zip_longest(ours, theirs), 1):
                if one is None or other is None or _essence(one) != _essence(other):
                    yield (
                        f"ranks {first.rank} and {second.rank} differ in number {number} of their {what}: "
                        f"{one or 'nothing'} against {other or 'nothing'}"
                    )
                    break


def _shared(record: RankRecord, other: RankRecord) -> list[Call]:
    return [call for call in record.calls if not call.is_point_to_point and other.rank in call.group]


def _one_way(record: RankRecord, name: str, other: RankRecord) -> list[Call]:
    return [call for call in record.calls if call.name == name and call.group[1] == other.rank]


def _essence(call: Call) -> tuple:
    """What both sides of a call agree on."""
    both = ("", ()) if call.is_point_to_point else (call.name, call.group)
    size = 0 if call.name.startswith("alltoall") else call.bytes  # each rank receives its own number of rows
    return (*both, call.phase, size, call.dtype)


def off_the_formulas(
    records: Sequence[RankRecord], mesh: Mesh, args: Namespace, shape: ModelShape, stages: Sequence[Parts]
) -> Iterator[str]:
    """Bytes between steps and FLOPs, off by more than TOLERANCE of them and PADDING bytes. Activations are not: their
    formula is an estimate, which the report has beside the peak."""
    memories, shapes = rank_memories(args, shape, stages), shapes_of_ranks(stages, shape, mesh.sizes.pp)
    sources = memory_sources(stages, shape)
    for record in records:
        pp = mesh.place(record.rank).pp
        found: dict[str, tuple[float, float]] = {
            f"bytes of {name}": (size, memories[pp].parts[name]) for name, size in record.state_bytes.items()
        }
        held, of_memory = stages[pp :: mesh.sizes.pp], sources[pp :: mesh.sizes.pp]
        for kind, expected in step_flops(mesh, args, shapes[pp], held, of_memory).items():
            found[f"FLOPs of {kind}"] = record.flops.get(kind, 0), expected
        for what, (counted, expected) in found.items():
            slack = TOLERANCE * expected + PADDING * what.startswith("bytes")
            if abs(counted - expected) > slack:
                yield f"rank {record.rank} has {counted:,.0f} {what}, the formulas say {expected:,.0f}"


def step_flops(
    mesh: Mesh, args: Namespace, shape: ModelShape, chunks: Sequence[Parts], sources: Sequence[int | None]
) -> dict[str, float]:
    """Of a rank that holds `chunks` (`memory_sources` of each), in a step: forward, what backward computes again, and
    twice forward.

    {"products": with weights; "attention": none where the number of its queries differs from rank to rank or follows
    from the documents, or layers unlike each other are recomputed}. `shape`: with means over the rank's layers.
    """
    layers = layer_flops_per_token(shape)
    layers["output_layer"] = {"linear": forward_flops_per_token(shape)["output_layer"], "mixing": 0.0}
    if shape.architecture == "yoco":  # of other mixers there is no attention
        mixing = shape.mean(lambda mixer: mixer.mixing_flops(shape) if mixer.is_softmax_attention else 0.0)
        layers["self_decoder"]["mixing"] = mixing
    linear = mixing = 0.0
    for chunk, source in zip(chunks, sources):
        again = recomputed_flops_per_token(args, shape, chunk, source)
        for part, count in chunk.items():
            of_part, of_part_again = layers.get(part, {}), again.get(part, {})
            linear += 3 * count * of_part.get("linear", 0.0) + of_part_again.get("linear", 0.0)
            mixing += 3 * count * of_part.get("mixing", 0.0)
            mixing += of_part_again.get("mixing", 0.0) if of_part.get("mixing") else 0.0
    sequences = args.global_batch_size / mesh.sizes.dp
    tokens = sequences * args.seq_length / (mesh.sizes.cp * mesh.sizes.tp)
    found = {"products": linear * tokens}
    # Formulas have the mean layer, of which full recompute takes some.
    some_of_each = args.recompute_granularity == "full" and len(shape.mixers) > 1
    if not args.dataloader_inter_document_masking and mesh.sizes.cp == 1 and not some_of_each:
        found["attention"] = mixing * tokens
    return found


def uncovered(records: Sequence[RankRecord], mesh: Mesh) -> Iterator[str]:
    """Tensors of the checkpoint that its shards do not cover exactly once."""
    boxes: dict[str, list[Shard]] = defaultdict(list)
    by_rank = {record.rank: record for record in records}
    for pp in range(mesh.sizes.pp):
        first, last = (by_rank[mesh.rank(Place(tp, 0, 0, pp))] for tp in (0, mesh.sizes.tp - 1))
        last_inside, last_other = (
            by_rank[mesh.expert_rank(pp, *place)] for place in ((mesh.expert_tp - 1, 0), (0, mesh.ep - 1))
        )
        shards = _of_all(first, [(last, mesh.sizes.tp)], of_experts=False)
        shards += _of_all(first, [(last_inside, mesh.expert_tp), (last_other, mesh.ep)], of_experts=True)
        for shard in shards:
            boxes[shard.key].append(shard)
    for key, shards in boxes.items():
        size = prod(shards[0].shape)
        if len({shard.shape for shard in shards}) > 1:
            yield f"ranks disagree on the shape of the checkpoint's {key}"
        elif _any_overlap(shards):
            yield f"several ranks would write the same values of the checkpoint's {key}"
        elif sum(prod(shard.size) for shard in shards) < size:
            yield f"no rank would write some of the {size:,} values of the checkpoint's {key}"


def _of_all(first: RankRecord, lasts: Sequence[tuple[RankRecord, int]], of_experts: bool) -> list[Shard]:
    """Of all ranks of a grid, from its first and the last in each direction, of so many; between these they are taken
    to be evenly spaced. Tensors of experts are divided otherwise than all others."""

    def sorted_shards(record: RankRecord) -> list[Shard]:
        shards = (shard for shard in record.shards if is_of_expert(shard.key) == of_experts)
        return sorted(shards, key=attrgetter("key", "offset"))

    begin = sorted_shards(first)
    keys = {shard.key for shard in begin}
    found, others = [(shard, shard.offset) for shard in begin], []
    for last, count in lasts:
        if count == 1:
            continue
        end = sorted_shards(last)
        others += [shard for shard in end if shard.key not in keys]
        ends = {shard.key for shard in end}  # of all other tensors the first rank writes the whole
        here, there = (Counter(shard.key for shard in side) for side in (begin, end))
        paired = {key for key in keys & ends if here[key] == there[key]}  # of others some are missing, and stay alone
        pairs = zip(*([shard for shard in side if shard.key in paired] for side in (begin, end)), strict=True)
        ways = {one: tuple(map(sub, other.offset, one.offset)) for one, other in pairs}
        found += [
            (shard, tuple(start + way * rank // (count - 1) for start, way in zip(offset, ways[shard])))
            for shard, offset in found
            if shard in ways
            for rank in range(1, count)
        ]
    return [replace(shard, offset=offset) for shard, offset in found] + others


def _any_overlap(shards: Sequence[Shard]) -> bool:
    near: list[Shard] = []  # in the first dimension
    for one in sorted(shards, key=attrgetter("offset")):
        near = [other for other in near if not one.offset or other.offset[0] + other.size[0] > one.offset[0]]
        if any(_overlap(one, other) for other in near):
            return True
        near.append(one)
    return False


def _overlap(one: Shard, other: Shard) -> bool:
    return all(a < b + n and b < a + m for a, m, b, n in zip(one.offset, one.size, other.offset, other.size))
