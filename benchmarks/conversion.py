"""A model larger than memory, from a training checkpoint to Hugging Face and back: seconds, peak memory, every bit.

    python benchmarks/conversion.py --model 13b --folder SCRATCH

Weights are random; each tensor can be drawn again, which is how the result is checked. SCRATCH needs room for two
copies of the model. Each conversion is a process of its own. Memory is what cannot be given back (RssAnon): pages of
mapped files are not counted, some 0.4 GiB of torch and Megatron are.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest import mock

import torch
from record import record

from yoco_megatron.startup.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The bf16 weights called `name`: alike at every call, of a size that keeps activations finite."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return tensor.uniform_(0.5, 1.5, generator=generator)
    return tensor.normal_(0, shape[1] ** -0.5, generator=generator)


def write(model: str, folder: Path) -> dict[str, float]:
    """A training checkpoint of the config's shape, tensor by tensor."""
    from yoco_megatron.convert import config_fields, tensor_names, writers
    from yoco_megatron.convert.readers import Source
    from yoco_megatron.startup.arguments import parse

    config_file = ROOT / f"configs/model/yoco_{model}.yaml"
    args = parse(["--config", str(config_file), "--mock-data", "--tokenizer-type", "NullTokenizer",
                  "--vocab-size", "100351", "--micro-batch-size", "1"])  # fmt: skip
    args.padded_vocab_size = 100_352
    config = config_fields.from_args(args)
    shapes = tensor_names.shapes(config)
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    source = Source("hf", folder, config, dtypes, lambda name: draw(name, shapes[name]))
    folder.mkdir()
    writers.write_megatron(source, folder)
    return {"MiB": source.bytes / MIB, "largest MiB": 2 * max(torch.Size(s).numel() for s in shapes.values()) / MIB}


class Memory:
    """The largest RssAnon of this process since the last call, in MiB, looked at fifty times a second."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, now)
            time.sleep(0.02)

    def __call__(self) -> float:
        peak, self.peak = self.peak / 1024, 0
        return peak


def convert(kind: str, folder: Path, to: str, output: Path) -> dict[str, dict[str, float]]:
    """Seconds and MiB of a conversion and of the comparison at its end."""
    from yoco_megatron.convert import convert, verify

    memory, compare, found = Memory(), verify.compare, {}
    start = time.perf_counter()

    def timed(*args: object) -> str:
        nonlocal start
        found["conversion"] = {"s": time.perf_counter() - start, "MiB": memory()}
        start = time.perf_counter()
        return compare(*args)

    with mock.patch.object(verify, "compare", timed):
        print(convert.convert(kind, str(folder), to, str(output)), file=sys.stderr)
    return found | {"comparison": {"s": time.perf_counter() - start, "MiB": memory()}}


def check(folder: Path) -> int:
    """The number of tensors, each of which is what was drawn. Raises AssertionError."""
    from yoco_megatron.convert import tensor_names
    from yoco_megatron.convert.readers import open_source

    source = open_source("megatron", str(folder))
    shapes = tensor_names.shapes(source.config)
    for name, shape in shapes.items():
        assert torch.equal(source.load(name), draw(name, shape)), name
    return len(shapes)


def alone(way: str, *args: object) -> object:
    """A `way` in a process of its own."""
    command = [sys.executable, __file__, "--way", json.dumps([way, *map(str, args)])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="13b", help="a size of configs/model")
    parser.add_argument("--folder", type=Path, help="where there is room; it must not exist")
    parser.add_argument("--note", default="", help="about the machine, for the rows")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        prepare()
        way, *rest = json.loads(args.way)
        call = {
            "write": lambda model, folder: write(model, Path(folder)),
            "convert": lambda kind, folder, to, output: convert(kind, Path(folder), to, Path(output)),
            "check": lambda folder: check(Path(folder)),
        }
        print(json.dumps(call[way](*rest)))
        return
    args.folder.mkdir()
    megatron, hf = args.folder / "megatron", args.folder / "hf"
    try:
        size = alone("write", args.model, megatron)
        print(f"model {size['MiB']:,.0f} MiB, largest tensor {size['largest MiB']:,.0f} MiB", flush=True)
        out = alone("convert", "megatron", megatron, "hf", hf)
        shutil.rmtree(megatron)
        back = alone("convert", "hf", hf, "megatron", megatron)
        print(f"{alone('check', megatron)} tensors are bitwise what they were", flush=True)
    finally:
        shutil.rmtree(args.folder)
    for case, found in ((f"{args.model}, megatron to hf", out), (f"{args.model}, hf to megatron", back)):
        for step, figures in found.items():
            print(f"  {case}, {step}: {figures['s']:,.0f} s, {figures['MiB']:,.0f} MiB", flush=True)
            common = dict(benchmark="conversion", device=f"{platform.machine()} CPU{args.note}", higher_is_better=False)
            record(
                args.output, case=f"{case}, {step}", metric="time", unit="s", value=round(figures["s"]), **common
            )  # fmt: skip
            record(
                args.output, case=f"{case}, {step}", metric="peak memory", unit="MiB", value=round(figures["MiB"]),
                peer="the model", peer_value=round(size["MiB"]), **common,
            )  # fmt: skip


if __name__ == "__main__":
    main()
