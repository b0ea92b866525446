"""What training is measured with: the models that are compared, precisions, meshes, and their flags."""

import argparse
import subprocess
import sys
from pathlib import Path

from mesh import Mesh
from runs import ROOT, Failure, Run, attempt

from yoco_megatron.config.yaml_files import load_config_files
from yoco_megatron.costs.gpu_peak import peak_flops

MODELS = {
    "GPT": "transformer_{}",
    "stock_GPT": "transformer_{}",  # with Megatron's trainer as it is
    "plain_Llama": "transformer_{}",  # without Megatron
    "gated_retention": "yoco_{}",
    "sliding_window": "yoco_{}_swa",
    "gated_delta_net": "yoco_{}_delta",
    "mamba2": "yoco_{}_mamba2",
    "samba": "yoco_{}_samba",
}
GPTS = ("GPT", "stock_GPT")
PEERS = (*GPTS, "plain_Llama")
SCRIPTS = {"stock_GPT": "benchmarks/stock_gpt.py", "plain_Llama": "benchmarks/plain_llama.py"}
PRECISIONS = {
    "bf16": "",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "delayed-gather": "--fp8-format hybrid --fp8-recipe delayed --fp8-param-gather",
    "tensorwise-gather": "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather",
}
# Forward and backward of a step as one CUDA graph, recorded in the fourth step; it cannot ask for NaN.
GRAPH = "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 3 --no-check-for-nan-in-loss-and-grad"
# In a process of its own: a CUDA context would take half a gigabyte from every run.
MEASURE_DEVICE = """
import torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
times = []
for _ in range(30):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    a @ b
    stop.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(stop))
print(torch.cuda.get_device_name(), 2 * 8192**3 / sorted(times)[15] * 1e3, sep="|")
"""


def measure_device() -> tuple[str, float, float]:
    """(name, stated and measured bf16 peak in FLOP/s); ("CPU", 0, 0) without a GPU."""
    run = subprocess.run([sys.executable, "-c", MEASURE_DEVICE], capture_output=True, text=True)
    if run.returncode:
        print(f"no GPU: {run.stderr.strip().splitlines()[-1]}", flush=True)
        return "CPU", 0.0, 0.0
    name, measured = run.stdout.strip().split("|")
    stated = peak_flops(name) or 0.0
    print(f"{name}: bf16 peak {stated / 1e12:.0f} TFLOP/s stated, {float(measured) / 1e12:.0f} measured", flush=True)
    return name, stated, float(measured)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is trained."""
    parser.add_argument("--model", default="3b", help="a size of configs/model")
    parser.add_argument("--with-config", type=Path, help="one more config file for all models, named in results")
    parser.add_argument("--layers", type=int, help="fewer layers, alike in all models")
    compared = [model for model in MODELS if model not in SCRIPTS]
    parser.add_argument("--models", nargs="+", choices=compared, default=compared[:3])
    parser.add_argument("--vocab-size", type=int, default=100_350)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens a step and GPU, at least one sequence")
    parser.add_argument("--loss-chunk-size", type=int, default=8192, help="of YOCO, and of GPT with --chunk-gpt-loss")
    parser.add_argument("--chunk-gpt-loss", action="store_true", help="give GPT our chunked loss, so that it fits")
    parser.add_argument("--cuda-graph", action="store_true", help="each step's forward and backward as one CUDA graph")
    parser.add_argument("--tp-comm-overlap", action="store_true", help="on meshes with TP, in all models")
    parser.add_argument(
        "--cp-comm-type", choices=["p2p", "all_gather", "a2a"], default="p2p", help="context parallelism of GPT"
    )
    parser.add_argument("--flags", default="", help="more flags for all models")
    parser.add_argument("--yoco-flags", default="", help="more flags for YOCO")
    parser.add_argument("--gpt-flags", default="", help="more flags for GPT")
    parser.add_argument("--steps", type=int, default=12, help="the median of the second half counts")
    parser.add_argument("--timeout", type=int, default=200, help="seconds for one run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")


def sequences(length: int, mesh: Mesh, options: argparse.Namespace) -> int:
    """Of a step, on all GPUs; at least one for each replica of the model."""
    return max(1, options.batch_tokens * (mesh.gpus // mesh.dp) // length) * mesh.dp


def config_of(model: str, options: argparse.Namespace) -> str:
    """The model's file."""
    return f"configs/model/{MODELS[model].format(options.model)}.yaml"


def layers_of(options: argparse.Namespace) -> int:
    """Of each model."""
    return options.layers or load_config_files([str(ROOT / config_of("GPT", options))])["num-layers"]


def gpt_flags(mesh: Mesh, options: argparse.Namespace) -> str:
    """What Megatron's GPT has to be told of a mesh, where a YOCO has its own exchange and its planner."""
    flags = f"--cp-comm-type {options.cp_comm_type}" if mesh.cp > 1 else ""
    if layers_of(options) % (mesh.pp * mesh.vp):  # then embedding and head count as a layer each
        flags += " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    return flags


def overlap_of(mesh: Mesh, options: argparse.Namespace) -> str:
    """The flag that overlaps tensor parallelism's communication with products, where there is any."""
    return "--tp-comm-overlap" if options.tp_comm_overlap and mesh.tp > 1 else ""


def flags_of(model: str, length: int, precision: str, micro_batch: int, mesh: Mesh, options: argparse.Namespace) -> str:
    """Flags of pretrain_yoco.py for one run."""
    chunked = options.loss_chunk_size and (model not in PEERS or (model in GPTS and options.chunk_gpt_loss))
    return (
        f"--config {config_of(model, options)} configs/recipe/scaling.yaml {options.with_config or ''} "
        f"--seq-length {length} --max-position-embeddings {length} --vocab-size {options.vocab_size} "
        f"--micro-batch-size {micro_batch} --global-batch-size {sequences(length, mesh, options)} "
        f"--exit-interval {options.steps} {f'--num-layers {options.layers}' if options.layers else ''} "
        f"{PRECISIONS[precision]} {mesh.flags} {overlap_of(mesh, options)} "
        f"{GRAPH if options.cuda_graph else ''} {options.flags} "
        f"--loss-chunk-size {options.loss_chunk_size if chunked else 0} "
        f"{gpt_flags(mesh, options) + ' ' + options.gpt_flags if model in PEERS else options.yoco_flags}"
    )


def title(model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace) -> str:
    """The case, as results name it."""
    layers = f" {options.layers} layers" if options.layers else ""
    parts = f" {options.with_config.stem}" if options.with_config else ""
    how = " with our chunked loss" if model in GPTS and options.loss_chunk_size and options.chunk_gpt_loss else ""
    more = f" {mesh.name}" if mesh.gpus > 1 else ""
    more += f" {options.cp_comm_type}" if model in GPTS and mesh.cp > 1 else ""
    more += f" {overlap}" if (overlap := overlap_of(mesh, options)) else ""
    more += " CUDA graph" if options.cuda_graph else ""
    own = options.gpt_flags if model in PEERS else options.yoco_flags
    more += f" {own}" if own else ""
    return f"{options.model}{parts}{layers} {model}{how} {length} {precision}{more}"


def largest_that_fits(
    model: str, length: int, precision: str, micro_batch: int, mesh: Mesh, options: argparse.Namespace, more: str = ""
) -> tuple[int, Run | Failure]:
    """Run with `micro_batch`, halved until it fits the memory: the micro-batch and how its run ended."""
    script = SCRIPTS.get(model, "pretrain_yoco.py")
    while True:
        name = " ".join([title(model, length, precision, mesh, options), *more.split()])
        flags = f"{flags_of(model, length, precision, micro_batch, mesh, options)} {more}"
        run = attempt(
            f"{name}, micro-batch {micro_batch}", flags, mesh.gpus, options.timeout, verbose=True, script=script
        )
        if isinstance(run, Run) or not run.out_of_memory or micro_batch == 1:
            return micro_batch, run
        micro_batch //= 2
        print(f"   out of memory: again with micro-batch {micro_batch}", flush=True)
