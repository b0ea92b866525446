"""Multi-token prediction (--mtp-num-layers): what it obeys."""

from argparse import Namespace
from typing import Any

from yoco_megatron.config.loss_suffix import suffix_length
from yoco_megatron.utils.errors import require


def check_model(config: Any) -> None:
    """Rules of a YOCO. `config`: a YOCOConfig, or arguments. Raises ValueError."""
    layers = config.mtp_num_layers or 0
    require(layers >= 0, f"--mtp-num-layers {layers} must be at least 0")
    if not layers:
        return
    flag = f"--mtp-num-layers {layers}"
    require(
        config.mtp_loss_scaling_factor > 0,
        f"--mtp-loss-scaling-factor {config.mtp_loss_scaling_factor} must be positive, or remove --mtp-num-layers",
    )
    require(config.num_experts is None, f"{flag} is not built for --num-experts: remove one of them")
    require(
        not config.fp8 or config.fp8_recipe != "delayed",
        f"{flag} does not go with --fp8-recipe delayed, whose scales are of one pass through a model's layers: choose "
        "another recipe, or bf16",
    )


def check_run(args: Namespace) -> None:
    """Rules of the arguments of a run of a YOCO. Raises ValueError."""
    if not args.mtp_num_layers:
        return
    require(
        args.mtp_num_layers < args.seq_length,
        f"--mtp-num-layers {args.mtp_num_layers} predicts beyond a sequence of --seq-length {args.seq_length}",
    )
    for flag, asked in (
        ("--teacher", args.teacher is not None),
        ("--cuda-graph-impl", args.cuda_graph_impl != "none"),
    ):
        require(not asked, f"{flag} is not built for --mtp-num-layers: remove one of them")
    suffix = suffix_length(args.loss_suffix, args.seq_length)
    require(
        suffix is None or suffix > args.mtp_num_layers,
        f"--loss-suffix {args.loss_suffix} leaves --mtp-num-layers {args.mtp_num_layers} without a loss: it needs one "
        "token more than there are layers",
    )
