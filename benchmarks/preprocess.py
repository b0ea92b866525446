"""Preprocessing: our tools beside Megatron-LM's own logic, with the same tokenizer on the same corpus, in one run.

    python benchmarks/preprocess.py --input corpus.jsonl --tokenizer-model TOKENIZER

The peer is what Megatron-LM's tools/preprocess_data.py does: a multiprocessing pool whose workers parse and encode one
line at a time, and one writer, an IndexedDatasetBuilder. Times start when the tokenizers are loaded. Memory is the peak
of the main process. The files must have the same bytes, or nothing is recorded.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

WORKER: dict = {}


def tokenizer_of(model: str):
    from megatron.training.config import TokenizerConfig

    from yoco_megatron.data.tokenizer import build_tokenizer

    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model))


def start_worker(model: str, ready) -> None:
    WORKER["tokenizer"] = tokenizer_of(model)
    ready.wait()


def encode_line(line: str) -> tuple[list[int], int]:
    """Ids of one document with its end, and the bytes of the line, as Megatron-LM's Encoder.encode gives them."""
    ids = WORKER["tokenizer"].tokenize(json.loads(line)["text"])
    if ids:
        ids.append(WORKER["tokenizer"].eod)
    return ids, len(line)


def megatron(corpus: str, model: str, prefix: str, workers: int) -> tuple[float, int]:
    """Seconds and tokens of Megatron-LM's way."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer_of(model).vocab_size)
    tokens, ready = 0, multiprocessing.Barrier(workers + 1)
    with multiprocessing.Pool(workers, start_worker, (model, ready)) as pool, open(corpus, encoding="utf-8") as lines:
        ready.wait()
        start = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids, _ in pool.imap(encode_line, lines, 32):
            if ids:
                builder.add_document(np.array(ids, dtype), [len(ids)])
                tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
        return time.perf_counter() - start, tokens


def ours(corpus: str, model: str, prefix: str, workers: int, backend: str) -> tuple[float, int]:
    """Seconds and tokens of tools/preprocess_data.py, checksums and fsync included."""
    from yoco_megatron.corpus.preprocess import preprocess

    tokenizer = tokenizer_of(model)
    start = time.perf_counter()
    reports = preprocess(
        [Path(corpus)], prefix, tokenizer, keys=["text"], append_eod=True, workers=workers, backend=backend
    )
    return time.perf_counter() - start, reports["text"].tokens


def run_one(args: argparse.Namespace) -> None:
    """One way, in this process; prints JSON."""
    common = (args.input, args.tokenizer_model, args.prefix, args.workers)
    seconds, tokens = megatron(*common) if args.way == "megatron" else ours(*common, args.way)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "tokens": tokens, "mib": kib / 1024}))


def measure(way: str, corpus: Path, prefix: Path, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--input", corpus, "--tokenizer-model", args.tokenizer_model]
    command += ["--workers", str(args.workers), "--way", way, "--prefix", prefix]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{way:>9}: {found['tokens'] / found['seconds']:,.0f} tokens/s, {found['seconds']:.2f} s, ", end="")
    print(f"main process {found['mib']:,.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="JSON lines")
    parser.add_argument("--tokenizer-model", required=True, help="folder of a tokenizer.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--way", choices=["megatron", "gigatoken", "library"], help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_one(args)
        return
    size = args.input.stat().st_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {way: measure(way, args.input, folder / way, args) for way in ("gigatoken", "library", "megatron")}
        for way in ("gigatoken", "library"):
            for suffix in ("bin", "idx"):
                own = (folder / f"{way}_text_document.{suffix}").read_bytes()
                assert own == (folder / f"megatron.{suffix}").read_bytes(), f"{way}: other bytes in the .{suffix}"
        four = folder / "four.jsonl"
        four.write_bytes(args.input.read_bytes() * 4)
        larger = measure("gigatoken", four, folder / "four", args)
    device = f"{args.workers} workers, {platform.machine()} CPU"
    peer = found["megatron"]["tokens"] / found["megatron"]["seconds"]
    case = f"{size / 1e6:.0f} MB of source code, {{}} backend"
    shared = dict(benchmark="preprocess", device=device)
    for way in ("gigatoken", "library"):
        record(
            args.output, case=case.format(way), metric="speed", unit="tokens/s", peer="Megatron-LM's logic",
            value=round(found[way]["tokens"] / found[way]["seconds"]), peer_value=round(peer), **shared,
        )  # fmt: skip
    record(
        args.output, case="corpus four times as large, gigatoken backend", metric="peak memory", unit="MiB",
        value=round(larger["mib"]), peer="the corpus once", peer_value=round(found["gigatoken"]["mib"]),
        higher_is_better=False, **shared,
    )  # fmt: skip


if __name__ == "__main__":
    main()
