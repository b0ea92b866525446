"""A small YOCO from short to long sequences, as configs/recipe/long_context_*.yaml do it, then the needle heat map.

    python benchmarks/length_extension.py prepare            # text, tokenizer, tokens, documents with retrieval
    python benchmarks/length_extension.py train --gpus 2     # a slice of nine minutes: repeat it until all are done
    python benchmarks/length_extension.py evaluate --gpus 2  # needles, Phonebook, loss by position; repeat it, too

A stage LENGTH:THETA:TOKENS:RATE trains on sequences of LENGTH with rotary base THETA, from the stage before.
Of its tokens a share (--retrieval) are documents of its length that ask for what stood in them (retrieval_text.py);
the rest is the source and documentation of the installed packages (site_text.py). A model is `retention`, or `window:W`
with a window of W tokens. Evaluated is the last stage of each, with documents that were not trained on as filler.
Window sizes are compared after the first stage alone, which they share with the models above:
--models window:64 window:256 window:1024 --stages 4096:10000:200e6:1e-3.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import site_text
from retrieval_text import documents
from slices import Job, add_arguments, evaluate_slice, gpus_of, run_slice

from yoco_megatron.convert import tokenizer_files
from yoco_megatron.evaluation.suite import make_task
from yoco_megatron.evaluation.tokenizer import TextTokenizer

CHARACTERS = 3.0  # of a token, about: documents with retrieval may be a little shorter than a stage's sequences
HELD_OUT = 0.02  # of the plain documents


class Stage(NamedTuple):
    """Of a schedule."""

    length: int
    theta: float
    tokens: float
    rate: float

    @classmethod
    def of(cls, text: str) -> "Stage":
        """LENGTH:THETA:TOKENS:RATE."""
        length, *rest = text.split(":")
        return cls(int(length), *map(float, rest))


def prepare(options: argparse.Namespace) -> None:
    """Plain text, documents with retrieval for each stage, filler for the needles."""
    folder = options.folder
    site_text.corpus_and_tokenizer(folder, options.text, options.vocab_size)
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    cut = len(texts) - max(1, round(HELD_OUT * len(texts)))
    filler = folder / "filler"
    filler.mkdir(exist_ok=True)
    for number, text in enumerate(texts[cut:]):
        (filler / f"{number:06d}.txt").write_text(text)
    (folder / "held_out.jsonl").write_text("\n".join(lines[cut:]) + "\n")
    (folder / "plain.jsonl").write_text("\n".join(lines[:cut]) + "\n")
    once(folder / "plain.jsonl", options)
    for stage in options.stages:
        corpus = folder / f"retrieval_{stage.length}.jsonl"
        if not corpus.exists():
            total = round(options.retrieval * stage.tokens * CHARACTERS)
            made = documents(texts[:cut], round(stage.length * CHARACTERS), total, stage.length)
            aside = corpus.with_suffix(".tmp")
            with aside.open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in made)
            aside.replace(corpus)
        once(corpus, options)


def once(corpus: Path, options: argparse.Namespace) -> None:
    """Tokenize a corpus, unless that is done."""
    prefix = corpus.with_suffix("")
    if not Path(f"{prefix}_text_document.json").exists():
        site_text.tokenize(corpus, options.folder / "tokenizer", prefix)


def job_of(model: str, number: int, options: argparse.Namespace) -> Job:
    """A stage of a model."""
    stage = options.stages[number]
    batch = max(1, options.batch_tokens // stage.length)
    steps = max(1, round(stage.tokens / (batch * stage.length)))
    kind, _, window = model.partition(":")
    config = f"configs/model/yoco_{options.size}{'_swa' if kind == 'window' else ''}.yaml"
    recipe = "configs/recipe/long_context_64k.yaml" if number else "configs/recipe/scaling.yaml"
    folder = options.folder / "runs"
    before = folder / f"{model.replace(':', '_')}_{options.stages[number - 1].length}" / "checkpoints"
    plain, retrieval = (
        options.folder / "plain_text_document",
        options.folder / f"retrieval_{stage.length}_text_document",
    )
    data = ("--data-path", 1 - options.retrieval, plain, options.retrieval, retrieval)
    warmup = max(1, min(20, steps // 5)) if number else max(1, steps // 20)
    flags = [
        *("--config", config, recipe, *(() if options.gpus else ("bf16=false",))),
        *(data if 0 < options.retrieval < 1 else ("--data-path", retrieval if options.retrieval else plain)),
        *("--split", "100,0,0", "--eval-iters", 0),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", options.folder / "tokenizer"),
        *("--seq-length", stage.length, "--max-position-embeddings", stage.length, "--rotary-base", round(stage.theta)),
        *("--micro-batch-size", max(1, min(batch, options.micro_tokens // stage.length)), "--global-batch-size", batch),
        *("--lr", stage.rate, "--lr-warmup-iters", warmup, "--lr-decay-iters", max(steps, warmup + 1)),
        *("--save-interval", max(1, steps // 4), "--log-interval", 10),
        *("--tensorboard-log-interval", 5, "--num-workers", 2 if options.gpus else 0),
        *(("--self-decoder-window", window) if window else ()),
        *(("--pretrained-checkpoint", before) if number else ()),
        *options.flags.split(),
    ]
    return Job(folder / f"{model.replace(':', '_')}_{stage.length}", tuple(map(str, flags)), steps)


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every model's stages, up to the first that is not done."""
    found = []
    for model in options.models:
        stages = [job_of(model, number, options) for number in range(len(options.stages))]
        trained = list(itertools.takewhile(Job.done, stages))
        found += [*trained, *stages[len(trained) : len(trained) + 1]]
    return found


def write_suite(options: argparse.Namespace) -> Path:
    """The suite of evaluation, with lengths up to the last stage's."""
    most = options.stages[-1].length
    lengths = [length for length in (most >> shift for shift in range(5, -1, -1)) if length > options.shortest]
    needle = {"depths": options.depths, "samples": options.samples, "filler": str(options.folder / "filler")}
    needles = [{"task": "needle", **needle}, {"task": "multi_needle", "needles": 4, **needle}]
    entries = [max(3, length // 30) for length in lengths]  # a line has some 20 tokens
    tasks: list[dict[str, Any]] = [
        *(shortened(task, lengths, most, options.folder / "tokenizer") for task in needles),
        {"task": "phonebook", "entries": entries, "samples": options.samples},
        {"task": "loss_by_position", "data": str(options.folder / "held_out.jsonl"), "length": most, "limit": 128},
    ]
    path = options.folder / "suite.yaml"
    path.write_text(json.dumps({"tasks": tasks}, indent=1) + "\n")
    return path


def shortened(task: dict[str, Any], lengths: list[int], most: int, tokenizer: Path) -> dict[str, Any]:
    """With lengths a little shorter, so that its longest prompt and answer fit."""
    text = TextTokenizer(tokenizer_files.load(tokenizer))
    for margin in (32 << shift for shift in range(8)):
        settings = task | {"lengths": [length - margin for length in lengths]}
        if make_task(settings).longest(text) <= most:
            return settings
    raise SystemExit(f"length_extension.py: no {task['task']} fits {most} tokens: set --shortest higher")


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate the models whose last stage is done for a slice of time."""
    suite = write_suite(options)
    last = len(options.stages) - 1
    ready = [job for model in options.models if (job := job_of(model, last, options)).done()]
    more = ["--overwrite"] if options.overwrite else []
    evaluations = {
        job.name: [
            *("--load", str(job.folder / "checkpoints"), "--suite", str(suite)),
            *("--output", str(job.folder / "evaluation"), *more),
        ]
        for job in ready
    }
    done = evaluate_slice(evaluations, gpus_of(options), options.seconds)
    if not all(done) or len(ready) < len(options.models):
        raise SystemExit(f"{sum(done)} of {len(options.models)} models are evaluated: repeat this command")
    print("all done", flush=True)


def main() -> None:
    stages = ["4096:10000:200e6:1e-3", "65536:640000:50e6:3e-4", "262144:5000000:20e6:1e-4"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "evaluate"])
    parser.add_argument("--models", nargs="+", default=["retention", "window:1024"], metavar="MODEL")
    parser.add_argument("--stages", nargs="+", type=Stage.of, default=[Stage.of(text) for text in stages])
    parser.add_argument("--retrieval", type=float, default=0.5, help="share of documents with retrieval")
    parser.add_argument("--micro-tokens", type=int, default=65536, help="tokens of a micro-batch, at least a sequence")
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--shortest", type=int, default=1000, help="needles in prompts longer than so many tokens")
    add_arguments(parser, "length_extension")
    parser.set_defaults(size="30m")
    parser.add_argument("--overwrite", action="store_true", help="replace results of another checkpoint")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.what == "prepare":
        prepare(options)
    elif options.what == "train":
        print(
            "all done" if run_slice(lambda: jobs(options), gpus_of(options), options.seconds) else "repeat this command"
        )
    else:
        evaluate(options)


if __name__ == "__main__":
    main()
