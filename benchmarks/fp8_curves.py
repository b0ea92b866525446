"""FP8 trains as bf16 does: one small model on real text, from one seed, in bf16 and in each FP8 recipe.

    python benchmarks/fp8_curves.py prepare                  # no GPU: the text, its tokenizer, its tokens
    python benchmarks/fp8_curves.py train                    # all recipes at once on one GPU; --gpus 2 shares them out
    python benchmarks/fp8_curves.py plot                     # the curves, to docs

The text is the source of Python's standard library, as in launch/demo.sh. Every run sees the same batches in the same
order. Compared are the means of the losses of the last steps (--last): a difference of more than --tolerance from bf16
ends in an error. Runs that share a GPU say nothing about speed, so none is recorded.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from cases import PRECISIONS, measure_device
from record import record
from runs import ROOT, Run, attempt

CURVES = ROOT / "benchmarks/fp8_curves.json"
INTERVAL = 10  # steps that one point of a curve is the mean of
# All widths are multiples of 16, as FP8 wants them.
MODEL = (
    "--architecture yoco --num-layers 8 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 4 --self-decoder-heads 8 "
    "--seq-length 512 --max-position-embeddings 512 --bf16 --micro-batch-size 32 --global-batch-size 32 "
    "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 50 --adam-beta2 0.95 --weight-decay 0.1 "
    "--clip-grad 1.0 --use-distributed-optimizer --untie-embeddings-and-output-weights"
)
WORDS = 4096


def prepare(folder: Path) -> None:
    """corpus.jsonl, tokenizer and data_text_document.bin/.idx in `folder`, with the tools of tools/."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer, data = folder / "corpus.jsonl", folder / "tokenizer", folder / "data"
    steps = (
        f"tools/gather_text.py --python-stdlib --output {corpus}",
        f"tools/train_tokenizer.py --input {corpus} --vocab-size {WORDS} --output {tokenizer}",
        f"tools/preprocess_data.py --input {corpus} --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {tokenizer} --append-eod --output-prefix {data}",
    )
    for step in steps:
        subprocess.run([sys.executable, *step.split()], cwd=ROOT, check=True)


def train(options: argparse.Namespace) -> dict[str, list[float]]:
    """{precision: losses of the first step and of every INTERVAL steps}."""
    # The tokens are there, so no tokenizer is needed: Megatron's NullTokenizer has one word more than it is told.
    data = (
        f"--data-path {options.folder}/data_text_document --split 100,0,0 --tokenizer-type NullTokenizer "
        f"--vocab-size {WORDS - 1} --train-iters {options.steps} --log-interval {INTERVAL} --eval-iters 0 --seed 1234"
    )

    def one(numbered: tuple[int, str]) -> Run:
        index, precision = numbered
        gpu = dict(CUDA_VISIBLE_DEVICES=str(index % options.gpus)) if options.gpus > 1 else {}
        cache = f"--data-cache-path {options.folder}/cache_{precision}"  # two runs that write one would race
        window = "--self-decoder-window 128" if options.self_decoder == "sliding_window" else ""
        flags = (
            f"{MODEL} --self-decoder {options.self_decoder} {window} {cache} {PRECISIONS[precision]} {options.flags}"
        )
        run = attempt(precision, flags, 1, options.timeout, verbose=True, data=data, env=gpu)
        if not isinstance(run, Run):
            raise SystemExit(f"{precision} failed: {run.reason}")
        return run

    with ThreadPoolExecutor(options.at_once or len(options.precisions)) as pool:
        runs = list(pool.map(one, enumerate(options.precisions)))
    return {precision: run.losses for precision, run in zip(options.precisions, runs)}


def compare(curves: dict[str, list[float]], options: argparse.Namespace, device: str) -> None:
    """Print and record the final losses beside that of bf16."""
    points = options.last // INTERVAL
    final = {precision: fmean(losses[-points:]) for precision, losses in curves.items()}
    worst = 0.0
    for precision, loss in final.items():
        difference = loss / final["bf16"] - 1
        worst = max(worst, abs(difference))
        print(f"{precision:<12} {loss:.4f} nats a token, {difference:+.3%} from bf16")
        record(
            options.output, benchmark="fp8 curves", metric=f"loss of the last {options.last} steps", unit="nats",
            case=f"{options.self_decoder}, {options.steps} steps, {precision}", value=round(loss, 4), peer="bf16",
            peer_value=round(final["bf16"], 4), higher_is_better=False, device=device,
        )  # fmt: skip
    if worst > options.tolerance:
        raise SystemExit(f"a final loss differs by {worst:.2%} from bf16's, allowed are {options.tolerance:.2%}")


def plot(curves: dict[str, list[float]], picture: Path) -> None:
    """Losses above, differences from bf16 below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    for precision, losses in curves.items():
        steps = [1, *range(INTERVAL, INTERVAL * len(losses), INTERVAL)]  # Megatron logs the first step by itself
        upper.plot(steps, losses, label=precision, linewidth=1)
        lower.plot(steps, [100 * (loss / base - 1) for loss, base in zip(losses, curves["bf16"])], linewidth=1)
    upper.set_ylabel("loss (nats a token)")
    upper.legend()
    lower.set_ylabel("from bf16 (%)")
    lower.set_ylim(-3, 3)
    lower.set_xlabel(f"step (each point the mean of {INTERVAL})")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "plot"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/fp8_curves", help="of the prepared text")
    parser.add_argument("--self-decoder", choices=["gated_retention", "sliding_window"], default="gated_retention")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--last", type=int, default=100, help="steps at the end whose losses are compared")
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--gpus", type=int, default=1, help="runs are dealt to that many GPUs")
    parser.add_argument("--at-once", type=int, help="runs at the same time; default: all")
    parser.add_argument("--flags", default="", help="more flags for every run")
    parser.add_argument("--timeout", type=int, default=500)
    parser.add_argument("--curves", type=Path, default=CURVES, help="what train writes and plot reads")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/fp8_curves.svg")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder.resolve())
    elif options.what == "plot":
        plot(json.loads(options.curves.read_text()), options.picture)
    else:
        if "bf16" not in options.precisions:
            parser.error("--precisions must include bf16: the others are compared with it")
        if not INTERVAL <= options.last <= options.steps:
            parser.error(f"--last {options.last} must lie between {INTERVAL} and --steps {options.steps}")
        options.folder = options.folder.resolve()
        device, *_ = measure_device()
        curves = train(options)
        options.curves.write_text(json.dumps(curves) + "\n")
        compare(curves, options, device)


if __name__ == "__main__":
    main()
