"""Index of a dataset of many documents: writing the .idx, and building the indices that training reads.

    python benchmarks/index_build.py --documents 1e6 1e7

Document lengths are synthetic (log-normal, median 300 tokens); no token is written, the .bin is a hole of its size. The
peer writes the .idx with megatron.core's IndexedDatasetBuilder from the same lengths, to the same bytes. Each figure is
of a process of its own; memory is its peak above what it had before.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import record

SEQ_LENGTH = 4096


def write_lengths(path: Path, documents: int) -> None:
    generator = np.random.default_rng(1)
    with path.open("wb") as stream:
        for start in range(0, documents, 1 << 20):
            count = min(1 << 20, documents - start)
            stream.write(np.clip(generator.lognormal(math.log(300), 1.2, count), 1, 1 << 20).astype(np.int32).tobytes())


def write_ours(folder: Path) -> None:
    from yoco_megatron.corpus.idx_writer import write_index

    write_index(folder / "ours.idx", np.memmap(folder / "lengths", np.int32, "r"), np.uint16)


def write_megatron(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
    builder.sequence_lengths = np.fromfile(folder / "lengths", np.int32).tolist()
    builder.document_indices = list(range(len(builder.sequence_lengths) + 1))
    builder.finalize(str(folder / "megatron.idx"))


def build(folder: Path) -> None:
    """One epoch of GPTDataset: document, sample and shuffle index."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=60_000)
    lengths = np.memmap(folder / "lengths", np.int32, "r")
    with (folder / "ours.bin").open("wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH, blend=([str(folder / "ours")], None), split="1,0,0",
        tokenizer=tokenizer, path_to_cache=str(folder / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    BlendedMegatronDatasetBuilder(GPTDataset, [1, None, None], lambda: True, config).build()


WAYS = {"ours": write_ours, "megatron": write_megatron, "build": build}


def run_one(way: str, folder: Path) -> None:
    import megatron.core.datasets.indexed_dataset
    import megatron.training.config  # noqa: F401  # so that the memory of imports does not count

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    WAYS[way](folder)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))


def measure(way: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--way", way, "--folder", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", type=float, default=[1e6, 1e7])
    parser.add_argument("--note", default="", help="about the machine, for the rows")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_one(args.way, args.folder)
        return
    for documents in map(int, args.documents):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_lengths(folder / "lengths", documents)
            found = {way: measure(way, folder) for way in WAYS}
            assert (folder / "ours.idx").read_bytes() == (folder / "megatron.idx").read_bytes(), "other bytes"
            files = sum(path.stat().st_size for path in (folder / "cache").rglob("*.npy"))
            size = (folder / "ours.idx").stat().st_size
        print(f"{documents:,} documents: .idx {size:,} bytes, cache {files:,} bytes")
        for way, figures in found.items():
            print(f"  {way:>8}: {figures['seconds']:.2f} s, {figures['mib']:,.0f} MiB", flush=True)
        common = dict(benchmark="index", device=f"{platform.machine()} CPU{args.note}", higher_is_better=False)
        for unit, key in (("s", "seconds"), ("MiB", "mib")):
            metric = {"s": "time", "MiB": "peak memory"}[unit]
            record(
                args.output, case=f"write .idx, {documents:.0e} documents", metric=metric, unit=unit, **common,
                value=round(found["ours"][key], 3), peer="IndexedDatasetBuilder",
                peer_value=round(found["megatron"][key], 3),
            )  # fmt: skip
            record(
                args.output, case=f"GPTDataset of one epoch, {documents:.0e} documents", metric=metric, unit=unit,
                value=round(found["build"][key], 3), **common,
            )  # fmt: skip


if __name__ == "__main__":
    main()
