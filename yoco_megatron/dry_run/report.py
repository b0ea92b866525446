"""What a dry run found, as text."""

from collections import Counter

from yoco_megatron.costs.memory import GIB
from yoco_megatron.dry_run.confirm import Confirmed
from yoco_megatron.dry_run.fake_rank import STEP
from yoco_megatron.utils.text_table import aligned


def report(confirmed: Confirmed) -> str:
    """A table of the ranks, one of what they exchange in a step, and what is wrong."""
    mesh = confirmed.mesh
    rows: list[tuple[str, ...]] = [
        (
            *("rank", "place", "parameters", "weights", "gradients", "optimizer", "peak", "by formula", "off"),
            *("TFLOP a step", "calls"),
        )
    ]
    for record in confirmed.records:
        place, flops = mesh.place(record.rank), sum(record.flops.values()) / 1e12
        formula = confirmed.memories[place.pp].total
        sizes = [f"{size / GIB:.3f} GiB" for size in (*record.state_bytes.values(), record.peak_bytes, formula)]
        off = f"{formula / record.peak_bytes - 1:+.1%}"
        counts = f"{flops:,.3f}", f"{len(record.calls):,}"
        rows.append((str(record.rank), str(place), f"{record.parameters:,}", *sizes, off, *counts))
    exchanges: list[tuple[str, ...]] = [("rank", "over", "call", "a step", "GB")]
    for record in confirmed.records:
        if record.rank % mesh.ranks_of_a_stage:
            continue
        count: Counter[tuple[str, str]] = Counter()
        size: Counter[tuple[str, str]] = Counter()
        for call in record.calls:
            if call.phase == STEP:
                kind = mesh.kind(call.group), call.name
                count[kind] += 1
                size[kind] += call.bytes
        exchanges += [(str(record.rank), *kind, str(n), f"{size[kind] / 1e9:.4f}") for kind, n in sorted(count.items())]
    if confirmed.problems:
        verdict = "\n".join(confirmed.problems)
    else:
        verdict = (
            f"{len(confirmed.records)} of {len(mesh)} ranks ran a step: their collectives, sends and receives match, "
            "each tensor of the checkpoint is written once, states and FLOPs are those of the formulas"
        )
    if confirmed.without:
        verdict += f"\nwithout {' and '.join(confirmed.without)}: this needs a GPU"
    return "\n\n".join([aligned(rows), aligned(exchanges), verdict])
