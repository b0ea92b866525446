"""What the results come to: the rows that are quoted, newest first, as a table and a picture.

RESULTS.md begins with the table, README shows the picture; `python benchmarks/record.py` makes both.
"""

from pathlib import Path
from typing import Any, NamedTuple

GPT, LLAMA = "Megatron", "Llama of the same sizes"
COLORS = {"YOCO": "C0", "Transformer": "C7"}
KEYS = {"YOCO": "value", "Transformer": "peer_value"}


class Headline(NamedTuple):
    """A comparison that is quoted: of the newest row that fits."""

    title: str
    benchmark: str
    case: str
    metric: str
    peer: str
    """How the peer's name begins."""
    device: str


H100, TWO_H100, H200 = "NVIDIA H100 80GB HBM3", "2x NVIDIA H100 80GB HBM3", "NVIDIA H200"
KEPT = "bf16 --keep-cross-attention, micro-batch 1"
TRAINING = {
    "3B, 4,096 tokens": "3b gated_retention 4096 bf16, micro-batch 2",
    "3B, 32,768": f"3b gated_retention 32768 {KEPT}",
    "3B of 8 layers, 131,072": f"3b 8 layers gated_retention 131072 {KEPT}",
}
FP8 = "3b gated_retention 4096 delayed, micro-batch 2"
PIPELINE = "3b gated_retention 4096 bf16 PP2xTP2 VP2 --tp-comm-overlap, micro-batch 4"
TWO_GPUS = "3b 8 layers gated_retention 131072 bf16 CP2 kept attention"
SUFFIX = "3b 8 layers gated_retention 131072 bf16, loss on the last 4096, positions with loss"
INFERENCE = {"32K": 32768, "64K": 65536, "128K": 131072, "256K": 262144, "512K": 524288, "1M": 1048576}
HEADLINES = [
    *(Headline(f"training, {title}", "training", case, "throughput", GPT, H100) for title, case in TRAINING.items()),
    Headline("training in FP8, 3B, 4,096", "training", FP8, "throughput", GPT, H100),
    Headline("training, 3B, 4,096, PP2xTP2 on four", "training", PIPELINE, "throughput", GPT, H100),
    Headline("training, 3B of 8 layers, 131,072, CP2", "context_parallel", TWO_GPUS, "throughput", "GPT", TWO_H100),
    Headline(
        "a loss on the last 4,096 of 131,072 tokens, 8 layers",
        *("loss_positions", SUFFIX, "time a step", "3b 8 layers GPT", f"1x {H100}"),
    ),
    *(
        Headline(f"inference, 3B, {length} tokens: {metric}", "inference", f"3b {tokens} bf16", metric, LLAMA, H200)
        for length, tokens in INFERENCE.items()
        if length in ("32K", "128K", "1M")
        for metric in ("memory", "prefill", "throughput")
    ),
]


def newest(headline: Headline, rows: list[dict]) -> dict:
    """Its row; extrapolated measurements count, and are marked in their metric.

    Raises:
        LookupError: there is none.
    """
    for row in reversed(rows):
        same = (row["benchmark"], row["case"], row["device"]) == (headline.benchmark, headline.case, headline.device)
        if same and row["metric"].split(" (")[0] == headline.metric and (row["peer"] or "").startswith(headline.peer):
            return row
    raise LookupError(f"results.jsonl has no row of {headline}")


def short(value: float) -> str:
    """As tables show a figure."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: list[dict]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | YOCO | the Transformer | ratio | on |", "|---|---|---|---|---|"]
    for headline in HEADLINES:
        row = newest(headline, rows)
        marked = " *" if "extrapolated" in row["metric"] else ""
        values = " | ".join(f"{short(row[key])} {row['unit']}" for key in ("value", "peer_value"))
        lines.append(f"| {headline.title} | {values}{marked} | {row['ratio']:.2f} | {row['device']} |")
    return [*lines, "", "\\* extrapolated from a sample of the prompt's chunks."]


def draw(path: Path, rows: list[dict]) -> None:
    """Training speed, and memory and prefill time of inference by length, beside the Transformer's."""
    from yoco_megatron.evaluation.pictures import figure

    with figure(path, 1, 3, width=3.6, height=3.0) as (training, memory, prefill):
        found = [newest(headline, rows) for headline in HEADLINES if headline.case in TRAINING.values()]
        for shift, name in ((-0.2, "YOCO"), (0.2, "Transformer")):
            places = [place + shift for place in range(len(found))]
            training.bar(places, [row[KEYS[name]] / 1000 for row in found], 0.4, color=COLORS[name], label=name)
        for place, row in enumerate(found):
            height = max(row["value"], row["peer_value"]) / 1000
            training.text(place, 1.03 * height, f"{row['ratio']:.2f} x", ha="center")
        training.set_xticks(range(len(found)), [title.replace(", ", "\n") for title in TRAINING], fontsize=8)
        training.set_ylim(0, 1.15 * max(row["value"] for row in found) / 1000)
        training.set_title("training, thousand tokens/s, one H100")
        draw_by_length(memory, "memory", rows)
        memory.set_title("inference, GB in use, one H200")
        draw_by_length(prefill, "prefill", rows)
        prefill.set_yscale("log")
        prefill.set_title("inference, seconds to prefill")
        for axis in (training, memory, prefill):
            axis.title.set_size(9)
            axis.legend(fontsize=8)


def draw_by_length(axis: Any, metric: str, rows: list[dict]) -> None:
    """A metric of inference against the number of tokens."""
    cases = [Headline("", "inference", f"3b {tokens} bf16", metric, LLAMA, H200) for tokens in INFERENCE.values()]
    found = [newest(case, rows) for case in cases]
    for name, color in COLORS.items():
        values = [row[KEYS[name]] for row in found]
        axis.plot(list(INFERENCE.values()), values, "o-", color=color, markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(INFERENCE.values()), list(INFERENCE))
    axis.minorticks_off()
    axis.set_xlabel("tokens")
