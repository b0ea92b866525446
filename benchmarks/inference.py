"""Inference: YOCO against its Transformer twin (same sizes, GQA, FlashAttention) in the same engine, as in the paper.

    python benchmarks/inference.py --model 3b                      # one H100 80GB
    python benchmarks/inference.py --model 3b --lengths 32768 65536 --prefill-seconds 30
    python benchmarks/inference.py --model 3b --dry-run            # what it will take, by formula

Per length, with random weights and tokens in bf16: memory (one sequence, prefill and decoding), prefill time (one
sequence), decode throughput at the largest batch that fits, and the paper's throughput, whose time is that of
prefilling the batch and decoding 1,024 tokens. Where all pieces of a prefill would take longer than --prefill-seconds,
some of them are measured, spread evenly from the first to the last: a piece's time is linear in its position. Where a
model does not fit, its memory and prefill time are extrapolated from the lengths that do. Both are marked with a star.

Memory is what was allocated at the peak, by the same counter for both; "occupied" is what the device itself says,
with CUDA's context, libraries and what the allocator keeps. Both models take the prompt in the same pieces; smaller
ones cost no time worth mentioning and save activations, 61 KB a token of 3B.

Each measurement is a line of --rows as soon as it is made, and what is there is not measured again: an interrupted run
goes on where it was, and a full file makes the table and the picture anew without a GPU. Ratios go to results.jsonl
when a length's second model is measured.
"""

import argparse
import gc
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

# Blocks of K,V come one by one: without this, the allocator keeps more than was asked for.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from record import record

from yoco_megatron import runtime
from yoco_megatron.config.yaml_files import load_config_files
from yoco_megatron.hf import modeling_yoco
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.cache import GlobalKV
from yoco_megatron.inference.engine import Engine
from yoco_megatron.ops.attention.quantized import SCALE_BYTES, pack

ROOT = Path(__file__).resolve().parents[1]
NEW, VOCAB = 1024, 100352
LENGTHS = [2**k * 1024 for k in range(5, 11)]
# Figures 7, 9 and 10 of the paper: memory, prefill, throughput ratios.
PAPER = {
    32768: (1.95, 2.87, 2.72),
    65536: (2.32, 5.05, 2.57),
    131072: (3.01, 8.36, 2.77),
    262144: (4.16, 15.55, 4.37),
    524288: (6.39, 30.3, 9.56),
    1048576: (9.38, 71.82, None),
}


# What a prediction counts with, all assumptions: about what FlashAttention 2 and large products reach on an H100, and
# seconds of a model's building and compiling, and of a length besides its prefill.
ASSUMED_FLOPS = 3.5e14
BUILDING, DECODING = 40.0, 6.0
DECODE_SECONDS = 1.0


@dataclass
class Row:
    """One model at one length."""

    model: str
    twin: bool
    length: int
    device: str
    settings: str
    """Flags that decide what is measured."""
    memory: float = float("nan")
    """Peak bytes allocated, weights included; nan if it did not fit."""
    prefill: float = float("nan")
    """Seconds, the median of all; nan if it did not fit."""
    prefills: list[float] = field(default_factory=list)
    batch: int = 0
    decode: float = 0.0
    """Tokens a second of the whole batch."""
    occupied: float = float("nan")
    """Bytes of the device that were not free then, CUDA's own included; nan on a CPU."""
    took: float = 0.0
    """Seconds of measuring it."""
    extrapolated: list[str] = field(default_factory=list)
    """Which of the figures are, in part or whole."""

    @property
    def throughput(self) -> float:
        """Tokens a second with the prefill of the whole batch, as the paper counts."""
        return self.batch * NEW / (self.batch * self.prefill + self.batch * NEW / self.decode) if self.decode else 0.0


def sizes_of(name: str) -> tuple[dict, dict]:
    """(sizes of both models, what a YOCO has besides), of configs/model."""
    flags = load_config_files([str(ROOT / f"configs/model/yoco_{name}.yaml")])
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=flags["hidden-size"],
        intermediate_size=flags["ffn-hidden-size"],
        num_hidden_layers=flags["num-layers"],
        num_attention_heads=flags["num-attention-heads"],
        num_key_value_heads=flags.get("num-query-groups", flags["num-attention-heads"]),
        max_position_embeddings=LENGTHS[-1] + NEW,
    )
    more = {"self_decoder": flags["self-decoder"], "self_decoder_heads": flags["self-decoder-heads"]}
    more["sliding_window"] = flags.get("self-decoder-window", 1024)
    more["shared_kv_sets"] = flags.get("shared-kv-sets", 1)
    return sizes, more


def predict(name: str, twin: bool, length: int) -> tuple[float, float]:
    """(bytes of weights and K,V of one sequence; FLOPs of its prefill), by formula: two a weight and token, and
    attention's two products over the causal half. Windows, states and activations are left out."""
    sizes, more = sizes_of(name)
    h, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    kv = sizes["num_key_value_heads"] * h // sizes["num_attention_heads"]
    mlp = 3 * h * sizes["intermediate_size"]
    if twin:
        body, running, storing = layers * (2 * h * h + 2 * kv * h + mlp), 1.0, layers
    else:  # half the layers run in a prefill, with q, k, v, g, o or (windows) less; the others have q, o
        body = layers // 2 * (5 * h * h + mlp) + (layers - layers // 2) * (2 * h * h + mlp)
        storing = more["shared_kv_sets"]
        body += storing * 2 * kv * h
        running = layers // 2 * (5 * h * h + mlp) / body
    memory = 2 * (body + 2 * VOCAB * h) + 2 * 2 * storing * kv * length
    return memory, 2 * body * running * length + (2 * layers * h * length**2 if twin else 0)


def activations(name: str, piece: int) -> float:
    """Bytes that a piece of a prompt needs while it passes an MLP, by formula: the residual, its norm, and three
    tensors as wide as the MLP."""
    sizes, _ = sizes_of(name)
    return 2 * (2 * sizes["hidden_size"] + 3 * sizes["intermediate_size"]) * piece


def expected_seconds(name: str, twin: bool, length: int, options: argparse.Namespace) -> float:
    """Of a prefill's measurement, by formula: the whole, or the sample of its pieces."""
    seconds = predict(name, twin, length)[1] / ASSUMED_FLOPS
    return seconds * len(sample(length, options.piece, seconds, options.prefill_seconds)) / -(-length // options.piece)


def sample(length: int, piece: int, seconds: float, budget: float) -> list[int]:
    """Numbers of the pieces to measure of a prefill expected to take `seconds`: all within the budget, or some (three
    at least), from the first to the last."""
    pieces = -(-length // piece)
    count = pieces if seconds <= budget else min(pieces, max(3, int(pieces * budget / seconds)))
    return [round(i * (pieces - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def build(name: str, twin: bool, device: torch.device) -> torch.nn.Module:
    """A model with random weights: a YOCO of configs/model, or a Llama of the same sizes."""
    sizes, more = sizes_of(name)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        if twin:
            from transformers import LlamaConfig, LlamaForCausalLM

            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = YocoForCausalLM(YocoConfig(**sizes, **more))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def fuse(model: torch.nn.Module) -> None:
    """Let torch fuse the elementwise parts of either model: norms, activations, rotations."""
    from transformers.models.llama import modeling_llama

    # Every module shares one code object; past the limit torch would silently stop compiling.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            module.compile(dynamic=True)
    modeling_yoco.rotate = torch.compile(modeling_yoco.rotate, dynamic=True)
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=True)


def sync(device: torch.device) -> float:
    """The time, when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prefill(engine: Engine, length: int, numbers: list[int], device: torch.device) -> float:
    """Seconds for `length` random tokens; from the pieces of these `numbers`, where they are not all (`sample`).

    Leaves the engine ready to decode."""
    parts = torch.randint(0, VOCAB, (1, length), device=device).split(engine.prefill_chunk, dim=1)
    last = len(parts) - 1
    if len(numbers) == len(parts):
        started = sync(device)
        for number, part in enumerate(parts):
            engine.take(part, last=number == last)
        total = sync(device) - started
    else:
        engine.take(parts[0], last=False)  # makes the cache
        fill(engine, length)
        times = []
        for number in numbers:
            engine.cache.length = number * engine.prefill_chunk
            started = sync(device)
            engine.take(parts[number], last=number == last)
            times.append(sync(device) - started)
        total = of_line(numbers, times, len(parts))
    engine.cache.start_decoding(device)
    return total


def of_line(numbers: list[int], times: list[float], count: int) -> float:
    """The sum of `count` times that lie on the line through these, by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (numbers, times))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(count * (y.mean() + slope * ((count - 1) / 2 - x.mean())))


def fill(engine: Engine, length: int) -> None:
    """Room for one token more than `length`, and noise in the global K,V: the power that a GPU takes, and so its clock,
    depends on the numbers."""
    engine.cache.length = length
    engine.cache.make_room()
    for layer in engine.cache.layers:
        for tensor in layer.tensors() if isinstance(layer, GlobalKV) else []:
            kind = engine.cache.kv_cache_dtype
            width = tensor.shape[-1] - SCALE_BYTES if kind else tensor.shape[-1]
            noise = torch.randn(*tensor.shape[:-1], width, device=tensor.device, dtype=engine.model.dtype)
            tensor.copy_(pack(noise, kind) if kind else noise)


def decode(engine: Engine, batch: int, most: int, device: torch.device) -> float:
    """Seconds a step: of as many as pass in about a second, at most `most`."""
    tokens = torch.zeros(batch, dtype=torch.long, device=device)

    def run(steps: int) -> float:
        nonlocal tokens
        started = sync(device)
        for _ in range(steps):
            tokens = engine.step(tokens).argmax(-1)
        return (sync(device) - started) / steps

    run(2)  # captures the step
    return run(max(1, min(most, int(DECODE_SECONDS / run(1)))))


@torch.no_grad()
def pretend(engine: Engine, batch: int, length: int, device: torch.device) -> None:
    """An engine as after a prefill of that length, without its time: the cache holds noise."""
    engine.prefill(torch.randint(0, VOCAB, (batch, 1), device=device))
    fill(engine, length)
    engine.cache.position.fill_(length)


def measure(model: torch.nn.Module, row: Row, options: argparse.Namespace) -> Row:
    """Everything about one model at one length; what does not fit stays nan."""
    device, begun = options.device, time.perf_counter()
    cuda = device.type == "cuda"
    weights = sum(p.nbytes for p in model.parameters())
    total = torch.cuda.get_device_properties(device).total_memory if cuda else options.memory

    def engine() -> Engine:
        return Engine(model, row.length + NEW + 64, reserve=row.twin, prefill_chunk=options.piece)

    clear(cuda)
    expected = predict(row.model, row.twin, row.length)[1] / ASSUMED_FLOPS
    numbers = sample(row.length, options.piece, expected, options.prefill_seconds)
    try:
        for _ in range(options.repeats):
            one = engine()
            row.prefills.append(prefill(one, row.length, numbers, device))
        row.prefill = median(row.prefills)
        decode(one, 1, 8, device)
    except torch.cuda.OutOfMemoryError:
        row.prefill, row.took = float("nan"), time.perf_counter() - begun
        return row
    row.extrapolated = ["prefill"] * (len(numbers) < -(-row.length // options.piece))
    per_sequence = one.cache.nbytes()
    row.memory = torch.cuda.max_memory_allocated() if cuda else weights + per_sequence
    if cuda:
        free, whole = torch.cuda.mem_get_info()
        row.occupied = whole - free
    del one
    clear(cuda)
    # A sequence's prefill needs its activations beside the others' caches.
    batch = max(1, min(512, int((0.96 * total - row.memory) // per_sequence) + 1))
    while batch:
        try:
            many = engine()
            pretend(many, batch, row.length, device)
            row.batch, row.decode = batch, batch / decode(many, batch, options.steps, device)
            batch = 0
        except torch.cuda.OutOfMemoryError:
            batch = batch * 15 // 16
        many = None
        clear(cuda)
    row.took = time.perf_counter() - begun
    return row


def clear(cuda: bool) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read(path: Path) -> dict[tuple[str, bool, int], Row]:
    """Measurements made before, by model, twin and length."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.model, row.twin, row.length): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b", help="of configs/model; 3b_swa has windows")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--prefill-seconds", type=float, default=10.0, help="sample the pieces of a longer prefill")
    parser.add_argument("--repeats", type=int, default=1, help="of each prefill; the median counts")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps timed, at most")
    parser.add_argument("--piece", type=int, default=4096, help="tokens of a prompt that run at a time")
    parser.add_argument("--dry-run", action="store_true", help="only say what is to measure")
    parser.add_argument("--no-fuse", action="store_true", help="do not compile the elementwise parts")
    parser.add_argument("--memory", type=float, default=2e9, help="bytes for a CPU run, to try the script")
    parser.add_argument("--rows", type=Path, default=ROOT / "inference_rows.jsonl", help="measurements, as they come")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/inference.svg")
    options = parser.parse_args()
    cuda = runtime.has_gpu()
    options.device = torch.device("cuda" if cuda else "cpu")
    device = torch.cuda.get_device_name() if cuda else "CPU"
    settings = (
        f"pieces of {options.piece}, prefills sampled above {options.prefill_seconds:g} s, {options.steps} steps, "
        f"{'not ' * options.no_fuse}fused"
    )
    rows = read(options.rows)
    keys = [(options.model, twin, length) for twin in (False, True) for length in sorted(options.lengths)]
    missing = [key for key in keys if key not in rows]
    here = f"{device}, {settings}"
    others = {f"{row.device}, {row.settings}" for key in keys if (row := rows.get(key))} - {here}
    if missing and others:
        raise SystemExit(f"--rows {options.rows} was measured with {others.pop()}; this is {here}: name another file")
    announce(missing, options)
    if options.dry_run:
        return
    begun = time.perf_counter()
    for twin in (False, True):
        todo = [key for key in missing if key[1] == twin]
        if not todo:
            continue
        model = build(options.model, twin, options.device)
        if not options.no_fuse:
            fuse(model)
        # Compiles, chooses kernels: a first piece and one that looks back at it.
        rehearsal = Engine(model, 3 * options.piece, reserve=twin, prefill_chunk=options.piece)
        prefill(rehearsal, 2 * options.piece, [0, 1], options.device)
        del rehearsal
        print(f"{time.perf_counter() - begun:.0f} s: {'Transformer' if twin else 'YOCO'} is ready", flush=True)
        for key in todo:
            row = rows[key] = measure(model, Row(*key, device, settings), options)
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"{time.perf_counter() - begun:.0f} s:", end=" ")
            show(row)
            if (options.model, not twin, row.length) in rows:
                compare(rows, row.length, options)
        del model
        clear(cuda)
    ours, theirs = (extrapolate([rows[key] for key in keys if key[1] == twin]) for twin in (False, True))
    table(ours, theirs)
    plot({False: ours, True: theirs}, options.plot)


def announce(missing: list[tuple[str, bool, int]], options: argparse.Namespace) -> None:
    """How long it will take, and in how much memory, before it does."""
    total = BUILDING * len({twin for _, twin, _ in missing})
    for key in missing:
        memory, flops = predict(*key)
        seconds = expected_seconds(*key, options)
        total += seconds + DECODING
        print(
            f"to measure: {'Transformer' if key[1] else 'YOCO':<12} {key[2]:>9,} tokens, "
            f"{(memory + activations(key[0], options.piece)) / 1e9:6.1f} GB, prefill {flops / 1e15:6.2f} PFLOP, "
            f"about {seconds:.1f} s" + " of a sample" * (seconds < 0.99 * flops / ASSUMED_FLOPS)
        )
    print(
        f"{len(missing)} measurements, about {total:.0f} s, if {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s are reached, a model "
        f"is built and compiled in {BUILDING:.0f} s and a length needs {DECODING:.0f} s besides its prefill",
        flush=True,
    )


def show(row: Row) -> None:
    star = {name: "*" * (name in row.extrapolated) for name in ("memory", "prefill")}
    figures = (
        f"{row.memory / 1e9:.2f} GB{star['memory']} ({row.occupied / 1e9:.2f} occupied), "
        f"prefill {row.prefill:.2f} s{star['prefill']} ({', '.join(f'{value:.3f}' for value in row.prefills)}), "
        f"decode {row.decode:.1f} tokens/s at batch {row.batch}, with prefill {row.throughput:.2f} tokens/s"
    )
    print(
        f"{'Transformer' if row.twin else 'YOCO':<12} {row.length:>9,} tokens: "
        f"{figures if row.memory == row.memory else 'out of memory'}; took {row.took:.0f} s",
        flush=True,
    )


def extrapolate(rows: list[Row]) -> list[Row]:
    """Memory (a + b n) and prefill time (a n + b n^2) of lengths that did not fit, from the two longest that did."""
    known = [row for row in rows if row.memory == row.memory][-2:]
    if len(known) < 2:
        return rows
    n, m = (row.length for row in known)
    slope = (known[1].memory - known[0].memory) / (m - n)
    square = (known[1].prefill / m - known[0].prefill / n) / (m - n)

    def filled(row: Row) -> Row:
        if row.memory == row.memory:
            return row
        memory = known[1].memory + slope * (row.length - m)
        seconds = row.length * (known[1].prefill / m + square * (row.length - m))
        return replace(row, memory=memory, prefill=seconds, extrapolated=["memory", "prefill"])

    return [filled(row) for row in rows]


METRICS = {
    "memory": ("GB", lambda row: row.memory / 1e9, False),
    "prefill": ("s", lambda row: row.prefill, False),
    "throughput": ("tokens/s", lambda row: row.throughput or float("nan"), True),
    "decode": ("tokens/s", lambda row: row.decode or float("nan"), True),
}


def starred(metric: str, *rows: Row) -> bool:
    """Whether a figure of these rows is extrapolated; a throughput holds a prefill."""
    return any(("prefill" if metric == "throughput" else metric) in row.extrapolated for row in rows)


def compare(rows: dict[tuple[str, bool, int], Row], length: int, options: argparse.Namespace) -> None:
    """A row a metric in results.jsonl, as soon as both models are measured at this length."""
    known = [rows[key] for key in sorted(rows) if key[0] == options.model]
    ours, theirs = (
        next(row for row in extrapolate([row for row in known if row.twin == twin]) if row.length == length)
        for twin in (False, True)
    )
    for metric, (unit, value, higher) in METRICS.items():
        a, b = value(ours), value(theirs)
        if a != a:
            continue
        record(
            options.output,
            benchmark="inference",
            case=f"{options.model} {length} bf16",
            metric=metric + (" (extrapolated in part)" if starred(metric, ours, theirs) else ""),
            unit=unit,
            value=round(a, 4),
            peer="Llama of the same sizes, same engine" + ("" if b == b else ": out of memory"),
            peer_value=round(b, 4) if b == b else None,
            device=ours.device,
            higher_is_better=higher,
        )


def table(ours: list[Row], theirs: list[Row]) -> None:
    """Ratios beside the paper's."""
    print(f"\n{'length':>9} " + " ".join(f"{metric:>12} {'paper':>6}" for metric in METRICS))
    for one, other in zip(ours, theirs):
        line = f"{one.length:>9,}"
        papers = (*PAPER.get(one.length, (None,) * 3), None)
        for (metric, (_, value, higher)), paper in zip(METRICS.items(), papers):
            a, b = value(one), value(other)
            line += (
                f" {a / b if higher else b / a:>11.2f}{'*' if starred(metric, one, other) else ' '} {paper or '':>6}"
            )
        print(line)
    print("*: extrapolated in part; nan: out of memory, at one sequence already")


def plot(rows: dict[bool, list[Row]], path: Path) -> None:
    """The paper's three figures: memory, prefill, throughput by length, with ratios. Hollow points are extrapolated."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    lengths = [row.length / 1024 for row in rows[False]]
    for axis, metric in zip(axes, METRICS):
        unit, value, higher = METRICS[metric]
        for twin, of_length in rows.items():
            (line,) = axis.plot(lengths, list(map(value, of_length)), label="Transformer" if twin else "YOCO")
            for row, length in zip(of_length, lengths):
                hollow = "white" if starred(metric, row) else line.get_color()
                axis.plot(length, value(row), "o", color=line.get_color(), markerfacecolor=hollow)
        for length, one, other in zip(lengths, rows[False], rows[True]):
            a, b = value(one), value(other)
            text = f"{a / b if higher else b / a:.2f}x"
            axis.annotate(text, (length, max(a, b)), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        title = "throughput with prefill" if metric == "throughput" else metric
        axis.set(xscale="log", yscale="log", xlabel="length (K tokens)", title=f"{title} ({unit})")
        axis.margins(x=0.1, y=0.15)
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
