"""Self-speculative generation with a model trained for it: how many drafts are accepted, and tokens a second.

    python benchmarks/mtp.py prepare            # text, tokenizer, tokens: three minutes on 64 cores
    python benchmarks/mtp.py train              # a slice of nine minutes: repeat it until it says: all done
    python benchmarks/mtp.py report --record    # table and rows; also of what is done so far

The runs are those of paper_ordering.py with --mtp-num-layers 1 (--folder runs/paper_ordering goes on with its text): a
small YOCO of each self-decoder, the first of --rates and --seeds, for --tokens. Then both continue --prompts documents
of the validation part, greedily and drawn, each time with drafts and without, by the same caches (on a GPU in bf16, by
transformers' and by the engine). On a CPU, as a test of some minutes: --size tiny --length 256
--batch-tokens 4096 --tokens 4e5 --rates 1e-3 --seeds 1 --split 99.9,0.02,0 --gpus 0 --prompts 2 --new 60.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from paper_ordering import TITLES, Case, Losses, job_of, make_parser, run
from record import record
from runs import device_name

from yoco_megatron.convert import tokenizer_files
from yoco_megatron.evaluation import comparison
from yoco_megatron.inference.engine import Engine
from yoco_megatron.inference.generation import CachedModel, Decoder, Sampling, generate
from yoco_megatron.inference.load import load_for_generation
from yoco_megatron.inference.speculative import Speculation, SpeculativeEngine, SpeculativeModel
from yoco_megatron.startup.prepare import prepare

PROMPT = 128
"""Tokens of a document that are given."""
WARM = 32
TEMPERATURES = (0.0, 0.8)


class Speed(NamedTuple):
    """Of all prompts together."""

    tokens_per_second: float
    accepted: float | None
    """Share of the drafts."""


def cases(options: argparse.Namespace, losses: Losses) -> list[Case]:
    """One run of each self-decoder."""
    return [Case(model, "mtp", options.rates[0], options.seeds[0], options.tokens) for model in options.models]


def prompts_of(options: argparse.Namespace, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The beginnings of long enough documents of the validation part, which ends the corpus (of two parts)."""
    training, validation, _ = map(float, options.split.split(","))
    lines = (options.folder / "corpus.jsonl").read_bytes().splitlines()
    texts = (json.loads(line)["text"] for line in lines[-int(len(lines) * validation / (training + validation)) :])
    beginnings = (encode(text[: 20 * PROMPT])[:PROMPT] for text in texts)
    return list(islice((ids for ids in beginnings if len(ids) == PROMPT), options.prompts))


def measure(decoder_of: Callable[[], Decoder], prompts: list[list[int]], new: int, sampling: Sampling) -> Speed:
    """Speed behind each prompt and the first WARM tokens, in which kernels are compiled and graphs recorded."""
    seconds, tokens, verified, accepted = 0.0, 0, 0, 0
    for prompt in prompts:
        decoder = decoder_of()
        steps = generate(decoder, [prompt], new, sampling)
        list(islice(steps, WARM))
        started = time.perf_counter()
        tokens += sum(1 for _ in steps)
        seconds += time.perf_counter() - started
        if isinstance(decoder, Speculation):
            verified, accepted = verified + decoder.verified, accepted + decoder.accepted
    return Speed(tokens / seconds, accepted / verified if verified else None)


def report(options: argparse.Namespace) -> None:
    """Print a line a measurement; with --record, append rows to --output."""
    prepare()
    for case in cases(options, {}):
        job = job_of(case, options)
        if job.done():
            report_case(case, str(job.folder / "checkpoints"), options)
        else:
            print(f"{job.name} is to be trained")


def report_case(case: Case, checkpoints: str, options: argparse.Namespace) -> None:
    """The same of one model."""
    common: dict[str, Any] = dict(benchmark="multi-token prediction", device=device_name(1) if options.gpus else "CPU")
    device, dtype = ("cuda", torch.bfloat16) if options.gpus else ("cpu", torch.float32)
    model, tokenizer = load_for_generation(checkpoints, device=device, dtype=dtype, speculative=True)
    prompts = prompts_of(options, partial(tokenizer_files.ids, tokenizer))
    pairs: dict[str, tuple[Callable[[], Decoder], Callable[[], Decoder]]] = {
        "transformers' caches": (partial(CachedModel, model), partial(SpeculativeModel, model))
    }
    if options.gpus:  # last: it gives the model another attention
        room = PROMPT + options.new + 1
        pairs["engine"] = (partial(Engine, model, room), partial(SpeculativeEngine, model, room))
    for caches, pair in pairs.items():
        for temperature in TEMPERATURES:
            sampling = Sampling(temperature, seed=1, vocab_size=tokenizer_files.rows(tokenizer))
            slow, fast = (measure(decoder_of, prompts, options.new, sampling) for decoder_of in pair)
            size = f"{options.size}, {comparison.short(case.tokens)} tokens, {TITLES[case.model]}"
            name = f"{size}, temperature {temperature:g}, {caches}"
            assert fast.accepted is not None
            print(f"{name}: {slow.tokens_per_second:.1f} tokens/s, with drafts {fast.tokens_per_second:.1f}, "
                  f"{fast.accepted:.1%} of which are accepted", flush=True)  # fmt: skip
            if options.record:
                record(options.output, case=name, metric="drafts accepted", unit="%",
                       value=round(100 * fast.accepted, 1), **common)  # fmt: skip
                record(options.output, case=name, metric="generation with drafts", unit="tokens/s",
                       value=round(fast.tokens_per_second, 1), peer="one token a pass, the same caches",
                       peer_value=round(slow.tokens_per_second, 1), **common)  # fmt: skip


if __name__ == "__main__":
    parser = make_parser(__doc__, "mtp", ["retention", "window"])
    parser.add_argument("--prompts", type=int, default=16, help="report: documents to continue")
    parser.add_argument("--new", type=int, default=256, help="report: tokens to continue them by")
    parser.set_defaults(rates=[1e-3], tokens=100e6)
    run(parser.parse_args(), cases, report)
