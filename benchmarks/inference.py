"""Inference: YOCO against its Transformer twin (same sizes, GQA, FlashAttention) in the same engine, as in the paper.

    python benchmarks/inference.py --model 3b                      # one H100 80GB
    python benchmarks/inference.py --model 3b --lengths 32768 65536 --prefill-seconds 30

Per length, with random weights and tokens in bf16: memory in total (one sequence, prefill and decoding), prefill time
(one sequence), decode throughput at the largest batch that fits, and the paper's throughput, whose time is that of
prefilling the batch and decoding 1,024 tokens. A prefill longer than --prefill-seconds is stopped and the rest
extrapolated from its pieces, whose time is linear in their position; where the twin does not fit its memory is
computed. Both are marked with a star. Rows go to results.jsonl, curves to a picture.
"""

import argparse
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from record import record

from yoco_megatron.config.files import load_config_files
from yoco_megatron.hf import modeling_yoco
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.cache import GlobalKV
from yoco_megatron.inference.engine import Engine

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


@dataclass
class Row:
    """One model at one length."""

    memory: float = float("nan")
    """Peak bytes allocated, weights included."""
    prefill: float = float("nan")
    """Seconds."""
    batch: int = 0
    decode: float = 0.0
    """Tokens a second of the whole batch."""
    notes: set[str] = field(default_factory=set)

    @property
    def throughput(self) -> float:
        """Tokens a second with the prefill of the whole batch, as the paper counts."""
        return self.batch * NEW / (self.batch * self.prefill + self.batch * NEW / self.decode) if self.decode else 0.0


def build(name: str, twin: bool, device: torch.device) -> torch.nn.Module:
    """A model with random weights: a YOCO of configs/model, or a Llama of the same sizes."""
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
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        if twin:
            from transformers import LlamaConfig, LlamaForCausalLM

            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            more = {"self_decoder": flags["self-decoder"], "self_decoder_heads": flags["self-decoder-heads"]}
            more["sliding_window"] = flags.get("self-decoder-window", 1024)
            model = YocoForCausalLM(YocoConfig(**sizes, **more))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def fuse(model: torch.nn.Module) -> None:
    """Let torch fuse the elementwise parts of either model: norms, activations, rotations."""
    from transformers.models.llama import modeling_llama

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


@torch.no_grad()
def prefill(engine: Engine, length: int, budget: float, device: torch.device) -> tuple[float, bool]:
    """(seconds for `length` tokens, whether a part of them is extrapolated). Leaves the engine ready to decode."""
    ids = torch.randint(0, VOCAB, (1, length), device=device)
    times: list[float] = []
    pieces = ids.split(engine.piece, dim=1)
    for part in pieces:
        started = sync(device)
        positions = torch.arange(engine.cache.length, engine.cache.length + part.shape[1], device=device)[None]
        engine._forward(part, positions)
        engine.cache.advance(part.shape[1])
        times.append(sync(device) - started)
        if sum(times) > budget and len(times) >= 3:
            break
    missing = len(pieces) - len(times)
    if missing:
        x = torch.arange(len(times), dtype=torch.float64)
        y = torch.tensor(times, dtype=torch.float64)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        rest = torch.arange(len(times), len(pieces), dtype=torch.float64)
        times += (y.mean() + slope * (rest - x.mean())).tolist()
    engine.cache.length = length
    engine.cache.make_room()
    engine.cache.start_decoding(device)
    return sum(times), missing > 0


def decode(engine: Engine, batch: int, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    tokens = torch.zeros(batch, dtype=torch.long, device=device)
    for _ in range(4):
        tokens = engine.step(tokens).argmax(-1)
    started = sync(device)
    for _ in range(steps):
        tokens = engine.step(tokens).argmax(-1)
    return (sync(device) - started) / steps


@torch.no_grad()
def pretend(engine: Engine, batch: int, length: int, device: torch.device) -> None:
    """An engine as after a prefill of that length, without its time: the cache holds noise."""
    engine.prefill(torch.randint(0, VOCAB, (batch, 64), device=device))
    engine.cache.length = length
    engine.cache.make_room()
    for layer in engine.cache.layers:
        for tensor in layer.tensors() if isinstance(layer, GlobalKV) else []:
            tensor.normal_()
    engine.cache.position.fill_(length)


def measure(model: torch.nn.Module, twin: bool, length: int, options: argparse.Namespace) -> Row:
    """Everything about one model at one length."""
    device, row = options.device, Row()
    cuda = device.type == "cuda"
    weights = sum(p.nbytes for p in model.parameters())

    def engine() -> Engine:
        return Engine(model, length + NEW + 64, reserve=twin, piece=options.piece)

    def clear() -> None:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    clear()
    # K and V of one token, all layers that store them.
    config = model.config
    layers = config.num_hidden_layers if twin else 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * layers * config.num_key_value_heads * head_dim * 2
    total = torch.cuda.get_device_properties(device).total_memory if cuda else options.memory
    try:
        one = engine()
        row.prefill, extrapolated = prefill(one, length, options.prefill_seconds, device)
        if extrapolated:
            row.notes.add("prefill")
        decode(one, 1, 8, device)
        per_sequence = one.cache.nbytes()
        row.memory = torch.cuda.max_memory_allocated() if cuda else weights + per_sequence
        del one
    except torch.cuda.OutOfMemoryError:
        row.memory, per_sequence = weights + per_token * (length + NEW) + options.activations, None
        row.notes.add("memory")
    clear()
    options.activations = max(options.activations, row.memory - weights - per_token * (length + NEW))
    if per_sequence is None:
        return row
    batch = max(1, min(512, int((0.92 * total - weights - 1.5e9) // per_sequence)))
    while batch:
        try:
            many = engine()
            pretend(many, batch, length, device)
            row.batch, row.decode = batch, batch / decode(many, batch, options.steps, device)
            del many
            break
        except torch.cuda.OutOfMemoryError:
            many = None
            batch = batch * 7 // 8
        clear()
    clear()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b", help="of configs/model; 3b_swa has windows")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--prefill-seconds", type=float, default=40.0, help="stop a prefill after that, extrapolate")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps timed")
    parser.add_argument("--piece", type=int, default=32768, help="tokens of a prompt that run at a time")
    parser.add_argument("--no-fuse", action="store_true", help="do not compile the elementwise parts")
    parser.add_argument("--memory", type=float, default=2e9, help="bytes for a CPU run, to try the script")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/inference.svg")
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows: dict[bool, dict[int, Row]] = {}
    for twin in (False, True):
        model = build(options.model, twin, options.device)
        if not options.no_fuse:
            fuse(model)
        options.activations = 0.0
        measure(model, twin, 3 * options.piece, options)  # compiles, chooses kernels
        rows[twin] = {}
        for length in options.lengths:
            row = rows[twin][length] = measure(model, twin, length, options)
            print(
                f"{'Transformer' if twin else 'YOCO':<12} {length:>9,} tokens: {row.memory / 1e9:6.2f} GB"
                f"{'*' * ('memory' in row.notes)}, prefill {row.prefill:8.2f} s{'*' * ('prefill' in row.notes)}, "
                f"decode {row.decode:9.1f} tokens/s at batch {row.batch}, with prefill {row.throughput:8.2f} tokens/s",
                flush=True,
            )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    table(rows, options, name)
    plot(rows, options)


def table(rows: dict[bool, dict[int, Row]], options: argparse.Namespace, device: str) -> None:
    """Ratios beside the paper's, and a row each in results.jsonl."""
    metrics = {
        "memory": ("GB", lambda row: row.memory / 1e9, False),
        "prefill": ("s", lambda row: row.prefill, False),
        "throughput": ("tokens/s", lambda row: row.throughput, True),
        "decode": ("tokens/s", lambda row: row.decode, True),
    }
    print(f"\n{'length':>9} " + " ".join(f"{metric:>12} {'paper':>6}" for metric in metrics))
    for length in options.lengths:
        ours, theirs = rows[False][length], rows[True][length]
        line = f"{length:>9,}"
        for metric, (unit, value, higher) in metrics.items():
            a, b = value(ours), value(theirs)
            known = a == a and b == b and a > 0 and b > 0
            ratio = (a / b if higher else b / a) if known else float("nan")
            star = "*" if metric in theirs.notes | ours.notes else ""
            paper = (*PAPER.get(length, (None,) * 3), None)[list(metrics).index(metric)]
            line += f" {ratio:>11.2f}{star or ' '} {paper or '':>6}"
            record(
                options.output,
                benchmark="inference",
                case=f"{options.model} {length} bf16",
                metric=metric + (" (extrapolated in part)" if star else ""),
                unit=unit,
                value=round(a, 4),
                peer="Llama of the same sizes, same engine" if known else None,
                peer_value=round(b, 4) if known else None,
                device=device,
                higher_is_better=higher,
            )
        print(line)


def plot(rows: dict[bool, dict[int, Row]], options: argparse.Namespace) -> None:
    """The paper's three figures: memory, prefill, throughput by length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    values = {
        "memory (GB)": lambda row: row.memory / 1e9,
        "prefill (s)": lambda row: row.prefill,
        "throughput with prefill (tokens/s)": lambda row: row.throughput or float("nan"),
    }
    for axis, (label, value) in zip(axes, values.items()):
        for twin, of_length in rows.items():
            lengths = [length / 1024 for length in of_length]
            name = "Transformer" if twin else "YOCO"
            axis.plot(lengths, [value(row) for row in of_length.values()], "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="length (K tokens)", title=label)
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(options.plot)
    print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
