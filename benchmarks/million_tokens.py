"""One sequence of a million tokens through a YOCO-3B-shaped stack on two GPUs: forward, backward, time and memory.

    python benchmarks/million_tokens.py                     # as many layers as fit, tried from many to few
    python benchmarks/million_tokens.py --layers 4 --length 524288
    python benchmarks/million_tokens.py --gpus 4 --layers 26 --suffix 4096 --cp-cross-attention queries keys

The stack is embedding, self-decoder, shared K,V and cross-decoder; the head, whose logits are no matter of context
parallelism, is left out, and so is the optimizer. Full recompute, the MLP in chunks. With --suffix the cross-decoder is
computed at the last positions alone. Prints what torch allocated beside the estimate of docs/context_parallel.md, part
by part.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from record import record
from runs import ROOT, device_name, last_error, torchrun

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from yoco_megatron.model.cross_decoder.travelling_queries import queries_travel
from yoco_megatron.model.init import initialize
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.query_shard import Runs, suffix_run
from yoco_megatron.parallel.pipeline.stages import StagePlan

GIB = 2**30
VOCABULARY, MLP_CHUNKS, WARM_UP = 8192, 16, 4096


def config_of(options: argparse.Namespace, ranks: int) -> YOCOConfig:
    """YOCO-3B's layers (configs/model/yoco_3b.yaml), fewer of them."""
    transformer_engine = runtime.has_transformer_engine()
    shape = dict(hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24, num_query_groups=8)
    if options.tiny:
        shape = dict(hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)
    return YOCOConfig(
        num_layers=options.layers,
        self_decoder=options.self_decoder,
        **shape,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=runtime.has_gpu(),
        gradient_accumulation_fusion=False,
        apply_rope_fusion=transformer_engine,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        context_parallel_size=ranks,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        keep_cross_attention=options.keep_cross_attention,
        cp_cross_attention=options.cp_cross_attention[0],
        mlp_chunks_for_training=MLP_CHUNKS,
    )


def runs_of(suffix: int | None, length: int) -> Runs | None:
    """The positions that are computed behind the shared K,V."""
    return suffix_run(suffix, length) if suffix else None


def estimate(config: YOCOConfig, length: int, ranks: int, parameters: int, suffix: int | None) -> dict[str, float]:
    """Bytes of the parts of a rank's memory that the design decides (docs/context_parallel.md)."""
    tokens, width = length // ranks, 2 * config.num_query_groups * config.kv_channels
    runs, held = runs_of(suffix, length), length
    if runs and queries_travel(config, ranks, length, runs, runtime.device()):
        held = tokens
    rows = (suffix or length) // ranks
    stored = config.num_cross_decoder_layers * config.num_attention_heads * (2 * config.kv_channels + 4)
    projected = {"gated_retention": 4, "sliding_window": 3}[config.self_decoder] * config.hidden_size
    return {
        "parameters and gradients, bf16": parameters * 4,
        "inputs of layers, kept": (config.num_self_decoder_layers * tokens + config.num_cross_decoder_layers * rows)
        * config.hidden_size
        * 2,
        "outputs of cross attention, kept": stored * rows if config.keep_cross_attention else 0,
        "shared K,V that are read": held * width * 2,
        "their gradient, fp32": held * width * 4,
        "a self-decoder layer's projection and its gradient": 2 * projected * tokens * 2,
        "one chunk of the MLP and its gradient": 6 * config.ffn_hidden_size * tokens // MLP_CHUNKS * 2,
    }


def worker(options: argparse.Namespace) -> None:
    """One rank of the measurement."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if runtime.has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if runtime.has_gpu() else "gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    config = config_of(options, ranks)
    stage = replace(StagePlan.of(config, [options.layers]).stage(0), post_process=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = YOCOModel(config, VOCABULARY, options.length, 8e7, stage=stage, pg_collection=groups)
    initialize(model, config, 1, "yoco", groups)
    model = model.to(runtime.device()).bfloat16().train()
    parameters = sum(param.numel() for param in model.parameters())
    tokens = torch.randint(0, VOCABULARY, (1, options.length // ranks), device=runtime.device())

    def allocated() -> float:
        return torch.cuda.memory_allocated() if runtime.has_gpu() else 0.0

    # Kernels are compiled and loaded.
    warm_up = runs_of(options.suffix and WARM_UP, WARM_UP * ranks)
    model(tokens[:, :WARM_UP], query_runs=warm_up).sum().backward()
    memory = {}
    for _ in range(options.repeats):
        model.zero_grad()
        if runtime.has_gpu():
            torch.cuda.reset_peak_memory_stats()
        torch.distributed.barrier()
        start = time.perf_counter()
        memory["before"] = allocated()
        hidden = model(tokens, query_runs=runs_of(options.suffix, options.length))
        memory["after forward"] = allocated()
        _wait()
        forward = time.perf_counter() - start
        hidden.backward(torch.ones_like(hidden) / hidden.numel())
        _wait()
        seconds = time.perf_counter() - start
        del hidden
    finite = all(param.grad is not None and param.grad.isfinite().all().item() for param in model.parameters())
    if runtime.has_gpu():
        memory["peak"] = torch.cuda.max_memory_allocated()
    if rank == 0:
        result = dict(
            forward=forward,
            seconds=seconds,
            finite=finite,
            memory=memory,
            estimate=estimate(config, options.length, ranks, parameters, options.suffix),
            parameters=parameters,
        )
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _wait() -> None:
    if runtime.has_gpu():
        torch.cuda.synchronize()


def measure(layers: int, way: str, options: argparse.Namespace) -> dict | None:
    """A fresh pair of processes; None where it did not fit."""
    script = [__file__, "--worker", "--layers", str(layers), "--length", str(options.length)]
    script += ["--self-decoder", options.self_decoder, "--repeats", str(options.repeats)]
    script += ["--tiny"] if options.tiny else []
    script += ["--keep-cross-attention"] if options.keep_cross_attention else []
    script += ["--suffix", str(options.suffix), "--cp-cross-attention", way] if options.suffix else []
    print(f"== {layers} layers, {options.length} tokens on {options.gpus} ranks", flush=True)
    run = torchrun(options.gpus, script, options.timeout, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    if run is None:
        print(f"   did not end within {options.timeout} s", flush=True)
        return None
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"   failed: {last_error(run.stderr)}", flush=True)
    return None


def report(layers: int, way: str, result: dict, options: argparse.Namespace, device: str) -> None:
    rate = options.length / result["seconds"] / options.gpus
    print(
        f"{options.length:,} tokens, {layers} layers, {result['parameters']:,} parameters: forward "
        f"{result['forward']:.1f} s, forward and backward {result['seconds']:.1f} s, {rate:,.0f} tokens/s/GPU, "
        f"gradients {'finite' if result['finite'] else 'NOT FINITE'}"
    )
    print(f"\n{'memory of a rank':<60} {'GiB':>8}")
    for name, value in result["estimate"].items():
        print(f"{'estimate: ' + name:<60} {value / GIB:>8.2f}")
    print(f"{'estimate: sum of these':<60} {sum(result['estimate'].values()) / GIB:>8.2f}")
    for name, value in result["memory"].items():
        print(f"{'measured: ' + name:<60} {value / GIB:>8.2f}")
    case = f"3b {layers} layers {options.self_decoder} {options.length} bf16 CP{options.gpus}, no head"
    case += ", kept attention" if options.keep_cross_attention else ""
    case += f", last {options.suffix}, {way} of cross attention travel" if options.suffix else ""
    common = dict(benchmark="context_parallel", case=case, device=device)
    record(options.output, metric="forward and backward", unit="s", value=round(result["seconds"], 2), **common)
    if "peak" in result["memory"]:
        value = round(result["memory"]["peak"] / GIB, 2)
        record(options.output, metric="peak memory", unit="GiB", value=value, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="default: 8, 6, 4, 2, until one fits")
    parser.add_argument("--length", type=int, default=2**20)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the last one counts: the first compiles kernels")
    parser.add_argument("--self-decoder", choices=["gated_retention", "sliding_window"], default="gated_retention")
    parser.add_argument("--keep-cross-attention", action="store_true", help="compute cross attention once")
    parser.add_argument("--suffix", type=int, help="last positions, computed behind the shared K,V; default: all")
    parser.add_argument("--cp-cross-attention", nargs="+", choices=["auto", "keys", "queries"], default=["auto"])
    parser.add_argument("--timeout", type=int, default=500, help="seconds for one run")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    device = device_name(options.gpus)
    for way in options.cp_cross_attention:
        for layers in [options.layers] if options.layers else [8, 6, 4, 2]:
            if result := measure(layers, way, options):
                report(layers, way, result, options, device)
                break
        else:
            sys.exit("nothing fitted: try a shorter --length")


if __name__ == "__main__":
    main()
