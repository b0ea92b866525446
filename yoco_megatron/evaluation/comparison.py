"""Runs beside each other: a table of where they ended, at equal tokens and at equal FLOPs."""

from pathlib import Path
from typing import Any

from yoco_megatron.evaluation.run_curves import EVALUATION, VALIDATION, RunCurves
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.text_table import aligned

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def names_of(runs: list[Path]) -> list[str]:
    """The shortest distinct names: the ends of the paths, without what all of them end with.

    Raises:
        ValueError: a run that is named twice.
    """
    parts = [run.resolve().parts for run in runs]
    require(len(set(parts)) == len(parts), "a run is named twice")
    while len(parts) > 1 and all(len(one) > 2 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def compare(runs: list[RunCurves]) -> list[dict[str, Any]]:
    """A row a run, JSON-able; what is not known is None. Losses in nats a token.

    Equal tokens: as many as the shortest run has; equal FLOPs: as many as the run with the fewest.
    """
    tokens = min(run.last_tokens for run in runs)
    known = [run.last_tokens * run.flops_per_token for run in runs if run.flops_per_token is not None]
    flops = min(known, default=None)
    rows = []
    for run in runs:
        speed, tflops = run.speed()
        at_flops = flops / run.flops_per_token if flops is not None and run.flops_per_token else None
        row: dict[str, Any] = dict(
            run=run.name,
            model=run.model,
            body_parameters=run.parameters,
            gpus=run.gpus,
            steps=run.last_step,
            tokens=run.last_tokens,
            flops=float(run.flops(run.last_step)) if run.flops_per_token is not None else None,
            hours=float(run.hours(run.last_step)),
            tokens_per_second=speed,
            tflops_per_gpu=tflops,
            training_loss=run.training_loss(),
            validation_loss=run.value(VALIDATION),
            equal_tokens=dict(
                tokens=tokens, training_loss=run.training_loss(tokens), validation_loss=run.value(VALIDATION, tokens)
            ),
            equal_flops=None
            if at_flops is None
            else dict(
                flops=flops, training_loss=run.training_loss(at_flops), validation_loss=run.value(VALIDATION, at_flops)
            ),
            others={tag: run.value(tag) for tag in (*run.validation_tags(), *run.curves) if shown(tag)},
            notes=run.notes,
        )
        rows.append(row)
    return rows


def shown(tag: str) -> bool:
    """Whether a curve is one of evaluation, or of a validation set of several."""
    return tag.startswith(EVALUATION) or (tag.startswith(VALIDATION) and tag != VALIDATION and not tag.endswith("ppl"))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    same_tokens = rows[0]["equal_tokens"]["tokens"]
    same_flops = next((row["equal_flops"]["flops"] for row in rows if row["equal_flops"]), None)
    heads = ["run", "model", "body", "tokens", "FLOP", "hours", "tokens/s", "TFLOP/s/GPU", "training", "validation"]
    heads += [f"at {short(same_tokens)} tokens"] + ([f"at {same_flops:.3g} FLOP"] if same_flops else [])
    lines = []
    for row in rows:
        line = [
            row["run"],
            row["model"],
            short(row["body_parameters"]),
            short(row["tokens"]),
            "-" if row["flops"] is None else f"{row['flops']:.3g}",
            f"{row['hours']:.3g}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["tflops_per_gpu"] is None else f"{row['tflops_per_gpu']:.3g}",
            _loss(row["training_loss"]),
            _loss(row["validation_loss"]),
            _losses(row["equal_tokens"]),
        ]
        lines.append(line + ([_losses(row["equal_flops"])] if same_flops else []))
    text = aligned([heads, *lines])
    others = sorted({tag for row in rows for tag in row["others"]})
    if others:
        more = [["last value", *(row["run"] for row in rows)]]
        more += [[tag, *(_loss(row["others"].get(tag)) for row in rows)] for tag in others]
        text += "\n\n" + aligned(more)
    notes = [f"{row['run']}: {note}" for row in rows for note in row["notes"]]
    return "\n".join([text, "", "Losses in nats a token; at equal tokens or FLOPs: training, validation.", *notes])


def short(count: float | None) -> str:
    """A count in three digits: 131M."""
    if count is None:
        return "-"
    return next((f"{count / size:.3g}{unit}" for size, unit in UNITS if count >= size), f"{count:.3g}")


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _losses(both: dict[str, Any] | None) -> str:
    return "-" if both is None else f"{_loss(both['training_loss'])}, {_loss(both['validation_loss'])}"
