"""Everything about the arguments of a run that can be wrong and seen before anything is started.

No check changes its input. `startup/arguments.py` calls them in order, between the steps of `startup/defaults.py`.
"""

import argparse
import os

import torch

from yoco_megatron import runtime
from yoco_megatron.checkpoint.architecture import check_checkpoint_exists, check_format, check_loadable
from yoco_megatron.config import run_rules
from yoco_megatron.config.flags import refusals
from yoco_megatron.costs.memory import GIB
from yoco_megatron.costs.shape import ModelShape, parameter_count, routed_parameters
from yoco_megatron.data import fingerprint
from yoco_megatron.data.tokenizer import check_flags as check_tokenizer_flags
from yoco_megatron.startup import data_flags, packages, resume_schedule, schedule
from yoco_megatron.startup.parser import build_parser
from yoco_megatron.utils.errors import require


def check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Sizes and mesh: what can be seen in the flags alone.

    Args:
        parser: that parsed them, whose defaults tell what was set.
    Raises:
        ValueError: a size that is missing or does not divide, or a flag that would have no effect.
    """
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        flag = "--" + dest.replace("_", "-")
        require(getattr(args, dest) is not None, f"{flag} is missing: set it, or use a config of configs/model/")
        require(getattr(args, dest) >= 1, f"{flag} {getattr(args, dest)} must be at least 1")
    folders = {"--load": args.load, "--save": args.save, "--pretrained-checkpoint": args.pretrained_checkpoint}
    for flag, place in folders.items():
        require(
            "://" not in (place or ""),
            f"{flag} {place}: checkpoints are checked, pruned and found on a file system: mount the storage",
        )
    if args.profile:
        start, end = args.profile_step_start, args.profile_step_end
        require(start < end, f"--profile-step-start {start} must be below --profile-step-end {end}")
        require(args.tensorboard_dir is not None, "--profile writes beside --tensorboard-dir, which is missing")
    run_rules.check(args, parser)


def check_effects(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Every flag does something, on a model like this.

    Raises:
        ValueError: flags that would not, or that are refused for another reason; all of them in one line.
    """
    refused = refusals(args, parser, args.architecture)
    require(not refused, f"{'; '.join(refused)} (docs/flags.md has every flag)")


def check_files(args: argparse.Namespace) -> None:
    """The files that the flags name.

    Raises:
        ValueError: no data, or data that are missing or damaged; a checkpoint of another model.
    """
    data_flags.check_named(args)
    check_loadable(args)
    check_format(args)


def check_training(args: argparse.Namespace) -> None:
    """What only training has to have: tools that read the flags of a run do without.

    Raises:
        ValueError: no tokenizer, or not that of the data; a length or warm-up that Megatron would only reject later;
            nothing to evaluate on; no checkpoint where one must be, or one that was trained on other data or another
            schedule.
    """
    require(not args.async_save or args.save is not None, "--async-save has no effect without --save: set both")
    check_tokenizer_flags(args)
    schedule.check(args)
    data_flags.check_enough(args)
    fingerprint.check_tokenizer(args)
    fingerprint.check_tokens(args)
    check_checkpoint_exists(args)
    fingerprint.check_resumable(args)
    resume_schedule.check_resumable(args)


def check_machine(args: argparse.Namespace) -> None:
    """What only the machine that trains has to have: a login node that submits the job may lack it.

    Raises:
        ValueError: Transformer Engine, a GPU or a package is asked for, and missing; flags that only the layers of
            Transformer Engine read, without it.
    """
    places = ["torch"] * (args.transformer_impl == "local") + ["cpu"] * (not runtime.has_gpu())
    parser = build_parser()
    refused = [said for place in places for said in refusals(args, parser, place)]
    require(not refused, "; ".join(refused))
    packages.check(args)
    for flag, wanted in (("--fp8-format", args.fp8), ("--tp-comm-overlap", args.tp_comm_overlap)):
        require(
            not (wanted and args.transformer_impl == "local"),
            f"{flag} needs the layers of Transformer Engine, and plain torch is used here: see tools/doctor.py",
        )
    require(
        args.transformer_impl != "transformer_engine" or runtime.has_transformer_engine(),
        "--transformer-impl transformer_engine: Transformer Engine is not usable here; remove the flag for plain "
        "torch, or see tools/doctor.py for how to install it",
    )
    for flag, asked in (("--use-sharp", args.use_sharp), ("--use-nccl-ub", args.nccl_ub)):
        require(not asked or runtime.has_gpu(), f"{flag} is of the network of GPUs, and there is none here: remove it")
    path = args.nccl_communicator_config_path
    require(
        path is None or os.path.isfile(path),
        f"--nccl-communicator-config-path {path}: there is no such file; name a YAML",
    )
    require(
        args.pipeline_model_parallel_comm_backend != "ucc" or torch.distributed.is_ucc_available(),
        "--pipeline-model-parallel-comm-backend ucc: this torch is built without UCC; remove it",
    )
    require(
        not args.use_precision_aware_optimizer or args.optimizer_cpu_offload or runtime.has_transformer_engine(),
        "--use-precision-aware-optimizer needs the optimizer of Transformer Engine, which is not usable here: remove "
        "it, or see tools/doctor.py",
    )
    require(
        args.cuda_graph_impl == "none" or runtime.has_gpu(),
        f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU, and there is none: remove it",
    )


def check_fits(args: argparse.Namespace) -> None:
    """Sizes that no memory holds, before hours are spent on making the model. Only what is certain: weights in the
    dtype of training, and the hidden states of one layer; `costs/memory.py` estimates the rest.

    Raises:
        ValueError: they alone are larger than the memory of this machine's GPU, or of the host where it trains.
    """
    shape = ModelShape.from_args(args)
    bytes_per_value = 1 if args.fp8_param_gather else args.params_dtype.itemsize
    tp, of_experts = args.tensor_model_parallel_size, routed_parameters(shape)
    weights = (sum(parameter_count(shape).values()) - of_experts) // tp
    weights += of_experts // args.expert_model_parallel_size // (args.expert_tensor_parallel_size or tp)
    weights = weights * bytes_per_value // args.pipeline_model_parallel_size
    states = args.seq_length * args.micro_batch_size * args.hidden_size * args.params_dtype.itemsize
    states //= args.context_parallel_size * args.tensor_model_parallel_size
    memory = runtime.memory_bytes()
    for what, size, fix in (
        ("the weights", weights, "check --num-layers, --hidden-size, --vocab-size and other sizes, or use more ranks"),
        ("the hidden states of one layer", states, "check --seq-length, --micro-batch-size and --hidden-size"),
    ):
        require(
            size <= memory,
            f"{what} of one process take {size / GIB:,.0f} GiB, and there are {memory / GIB:,.0f} GiB: {fix}",
        )


def check_launched() -> None:
    """A process must know where the others are, before anything is written for it.

    Raises:
        ValueError: nothing says where.
    """
    require(
        {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
        "MASTER_ADDR and MASTER_PORT are not set: start it by torchrun, for one GPU as "
        "torchrun --nproc-per-node 1 pretrain_yoco.py ..., or on a cluster by launch/slurm/submit.py",
    )
