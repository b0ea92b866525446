"""Which of Megatron's flags train a model fastest: a short trial, one question after the other.

A question keeps the answer that was fastest so far, so that a trial has as many runs as there are answers, not as many
as their combinations. What does not fit the memory or is refused is no answer. GPT is asked about its loss; the other
questions are for all models alike.
"""

import argparse
import re
from dataclasses import dataclass

from cases import GRAPH, MODELS, largest_that_fits, layers_of, sequences
from mesh import Mesh
from runs import Run

LOSSES = [f"--cross-entropy-loss-fusion --cross-entropy-fusion-impl {which}" for which in ("native", "te")]


@dataclass(frozen=True)
class Choice:
    """The fastest micro-batch and flags of a model, and its run with them."""

    micro_batch: int
    flags: str
    run: Run


def micro_batches(items: list[str]) -> dict[str, list[int]]:
    """`2`, `4` or `GPT=1,2` to {model: micro-batches, largest first}; a model's own items replace those of all."""
    own: dict[str, list[int]] = {}
    for item in items:
        model, _, sizes = item.rpartition("=")
        if (model and model not in MODELS) or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes):
            raise ValueError(f"--micro-batches {item}: expected N or MODEL=N,N with a model of {', '.join(MODELS)}")
        own.setdefault(model, []).extend(int(size) for size in sizes.split(","))
    return {model: sorted(own.get(model, own.get("", [1])), reverse=True) for model in MODELS}


def questions(model: str, precision: str, mesh: Mesh, options: argparse.Namespace) -> list[list[str]]:
    """Of each question its answers beside the empty one; what the call's flags decide for all is no question."""
    given = f"{options.flags} {options.gpt_flags if model == 'GPT' else options.yoco_flags}"
    asked = []
    if model == "GPT" and not options.chunk_gpt_loss:
        asked.append(LOSSES)
    if mesh.tp > 1 and not options.tp_comm_overlap:
        asked.append(["--tp-comm-overlap"])
    if mesh.pp == mesh.cp == 1 and not options.cuda_graph:
        asked.append([GRAPH])
    if precision in ("delayed", "tensorwise"):
        asked.append(["--fp8-param-gather"])
    if "--recompute-granularity full" in given:
        # Counted in a stage; in each half of it, where a stage has a self-decoder and a cross-decoder.
        layers = layers_of(options) // (mesh.pp * mesh.vp) // (1 if model == "GPT" else 2)
        asked.append(
            [f"--recompute-method block --recompute-num-layers {layers - kept}" for kept in (1, 2, 4) if kept < layers]
        )
    elif "--recompute" not in given:
        asked.append(["--recompute-granularity selective --recompute-modules mlp"])
    return asked


def fastest(
    model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace, flags: str = ""
) -> Choice | None:
    """The fastest of the model's micro-batches with `flags`, none of them twice; None where all fail."""
    best, tried = None, set()
    most = sequences(length, mesh, options) // mesh.dp
    for size in micro_batches(options.micro_batches)[model]:
        if size > most or size in tried:
            continue
        fitted, run = largest_that_fits(model, length, precision, size, mesh, options, flags)
        tried |= {size, fitted}
        if isinstance(run, Run) and (best is None or run.seconds < best.run.seconds):
            best = Choice(fitted, flags, run)
    return best


def tuned(model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace) -> Choice | None:
    """The fastest of what there is to choose."""
    best = fastest(model, length, precision, mesh, options)
    for answers in questions(model, precision, mesh, options):
        before = best.flags if best else ""  # what fits only with recompute has no answer yet
        for answer in answers:
            found = fastest(model, length, precision, mesh, options, f"{before} {answer}".strip())
            if found and (best is None or found.run.seconds < best.run.seconds):
                best = found
    return best
