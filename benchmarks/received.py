"""What context parallelism moves in a step, by the formulas of docs/context_parallel.md."""

from runs import MOCK

from yoco_megatron.startup.prepare import prepare

prepare()

from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.traffic import received_bytes
from yoco_megatron.startup import arguments


def received_gigabytes(flags: str, cp: int, sequences: int, tp: int = 1) -> float:
    """GB that a rank of `cp` x `tp` receives from context-parallel ranks for `sequences` sequences.

    `flags`: those of pretrain_yoco.py for the same model and length on one GPU; nothing is started.
    """
    args = arguments.parse([*MOCK.split(), *flags.split()])
    recompute = args.recompute_granularity == "full"
    parts = received_bytes(ModelShape.from_args(args), cp, sequences, recompute=recompute)
    return sum(parts.values()) / tp / 1e9  # every part is heads', which tensor parallelism divides
