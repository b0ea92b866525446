"""A card's figures from what its GPUs do here: every rank measures, the slowest of them counts, the first one writes.

    torchrun --nproc-per-node 8 tools/plan.py calibrate --output card.yaml

Products, attention and all else are timed warm, on all GPUs at once, because they share power and air. What a layer
takes beyond its products and its mixer is measured in layers of the trainer (`layers`), so that a whole layer is right.
"""

import contextlib
import dataclasses
import datetime
import io
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training.initialize import initialize_megatron

from yoco_megatron import runtime
from yoco_megatron.calibration import kernels, layers, links
from yoco_megatron.costs.card import Card
from yoco_megatron.costs.gpu_peak import TFLOPS, peak_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import part_seconds_of_run
from yoco_megatron.startup import arguments
from yoco_megatron.startup.load_run import set_environment_of_one_process
from yoco_megatron.utils.files import check_writable, write_atomically
from yoco_megatron.utils.text_table import aligned


def calibrate(output: Path, base: Card, trial: bool = False) -> str:
    """Measure, write the file of a card, and return a table of it beside `base`, on the first rank; elsewhere "".

    Args:
        base: what is not measured is taken from it.
        trial: tiny sizes, to see that all runs.
    Raises:
        ValueError: there is no GPU, and this is no trial.
        OSError: `output` cannot be written.
    """
    if not (runtime.has_gpu() or trial):
        raise ValueError("calibrate measures GPUs, and there is none here: --trial runs it with tiny sizes on the CPU")
    if os.environ.get("RANK", "0") == "0":
        check_writable(output)
    set_environment_of_one_process()
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists all arguments
        arguments.parse_and_validate(layers.flags(trial))
        initialize_megatron()
        model = layers.build()
    sizes = kernels.TRIAL if trial else kernels.Sizes()
    _say("products, attention, retention, head, optimizer")
    measured = kernels.measure(sizes)
    _say("collectives")
    rings = links.measure(sizes.collective)
    _say("whole layers")
    few, many = layers.measure(model, sizes.seconds, trial)
    measured |= {"launch_ms": few * 1e3, "gpu_ms": many * 1e3}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, measured)
    rank, args = dist.get_rank(), get_args()
    # Not of a rank that fails: NCCL would wait there for the others, and torchrun could not end them.
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    if rank:
        return ""
    card = _card(everywhere, rings, args, base)
    write_atomically(output, yaml.safe_dump(dataclasses.asdict(card), sort_keys=False, width=110))
    return _report(card, base, everywhere, rings, output)


def _say(what: str) -> None:
    if dist.get_rank() == 0:
        print(f"measuring {what} on {dist.get_world_size()} GPUs", file=sys.stderr, flush=True)


def _card(everywhere: list[dict[str, Any]], rings: dict[str, links.Ring], args: Namespace, base: Card) -> Card:
    """Of the slowest rank's figures."""
    slow = {name: _slowest([rank[name] for rank in everywhere], name) for name in everywhere[0]}
    device = torch.cuda.get_device_name() if runtime.has_gpu() else "CPU"
    where = f"{len(everywhere)} x {device}"
    kept = [name for name in ("node", "network") if name not in rings]
    kept += [] if "cast_ps" in slow else ["FP8"]
    figures: dict[str, Any] = {
        "name": next((name for name in TFLOPS if name in device), device),
        "source": f"measured on {where}, {datetime.date.today()}, torch {torch.__version__}; not measured, "
        f"but those of {base.name}: " + ", ".join([*kept, "step", "launches of several ranks (in proportion)"]),
        "memory_gib": runtime.memory_bytes() / 2**30,
        "gpus_per_node": torch.cuda.device_count() if runtime.has_gpu() else base.gpus_per_node,
        "peak_tflops": (peak_flops(device) or base.peak) / 1e12,
        **{
            name: slow["launch_ms"] * getattr(base, name) / base.launch_ms
            for name in ("launch_of_many_ms", "launch_context_ms", "launch_tensor_pipeline_ms", "launch_chunk_ms")
        },
    }
    figures |= {name: value for name, value in slow.items() if name != "gpu_ms"}
    for name, ring in rings.items():
        figures |= {f"{name}_gb_per_s": ring.gb_per_s, f"{name}_latency_us": ring.latency_us}
    card = dataclasses.replace(base, **{name: _rounded(value) for name, value in figures.items()})
    return dataclasses.replace(card, elementwise_ps=_rounded(_elementwise(card, args, slow["gpu_ms"] * 1e-3)))


def _elementwise(card: Card, args: Namespace, layer: float) -> float:
    """What is left of a layer's seconds for a token, forward and backward, after products and mixers."""
    shape = ModelShape.from_args(args)
    rates = dataclasses.replace(card.rates(args), elementwise=0.0)
    known = part_seconds_of_run(shape, args, rates)
    self_layers, cross_layers = shape.num_self_decoder_layers, shape.num_cross_decoder_layers
    products = 3 * (self_layers * known["self_decoder"] + cross_layers * known["cross_decoder"] + known["shared_kv"])
    left = layer - (products + 3 * known["output_layer"]) / args.num_layers
    return max(0.1, left / 3 / (shape.hidden_size + shape.ffn_hidden_size) * 1e12)


def _slowest(values: list[Any], name: str) -> Any:
    """Of the ranks' figures: rates are low, times are high."""
    if isinstance(values[0], dict):
        return {key: _slowest([value[key] for value in values], name) for key in values[0]}
    return min(values) if name.endswith("tflops") else max(values)


def _rounded(value: Any) -> Any:
    """To four digits, as more would say nothing."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _report(
    card: Card, base: Card, everywhere: list[dict[str, Any]], rings: dict[str, links.Ring], output: Path
) -> str:
    """The card beside `base`, how much the GPUs differ, and the collectives by size."""
    rows = [("figure", "measured", base.name, "ratio")]
    for field in dataclasses.fields(Card):
        here, there = getattr(card, field.name), getattr(base, field.name)
        pairs = (
            [(str(key), here[key], there.get(key)) for key in here] if isinstance(here, dict) else [("", here, there)]
        )
        for key, one, other in pairs:
            if isinstance(one, float):
                ratio = f"{one / other:.2f}" if other else ""
                rows.append((f"{field.name} {key}".strip(), f"{one:g}", f"{other:g}" if other else "", ratio))
    lines = [card.source, "", aligned(rows)]
    rates = [rank["linear_tflops"] for rank in everywhere]
    if len(rates) > 1:
        each = " ".join(f"{rate:.3g}" for rate in rates)
        lines += [
            "",
            f"products by GPU, TFLOP/s: {each}; the slowest {1 - min(rates) / max(rates):.1%} below the fastest",
        ]
    for name, ring in rings.items():
        sizes = ", ".join(
            f"{size / 2**20:g} MiB {size * (ring.ranks - 1) / ring.ranks / time / 1e9:.3g}" for size, time in ring.times
        )
        lines += ["", f"{name}, {ring.ranks} ranks, GB/s that a rank sends: {sizes}"]
    return "\n".join([*lines, "", f"written: {output}; use it with --card {output}"])
