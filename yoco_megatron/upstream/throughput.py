"""Tokens a second, FLOP/s, their share of the GPU's peak, memory and the time left, for lines and curves.

The positions with a loss (step_positions.py) stand beside them.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_timers
from megatron.training.global_vars import get_wandb_writer

from yoco_megatron import runtime
from yoco_megatron.costs.gpu_peak import peak_flops
from yoco_megatron.costs.memory import GIB
from yoco_megatron.upstream import step_positions
from yoco_megatron.utils.units import duration, with_unit


@dataclass(frozen=True)
class Rates:
    """Of the steps since the last line, of the whole run where it does not say per GPU."""

    seconds_per_step: float
    tokens_per_second: float
    flops_per_gpu: float
    peak_per_gpu: float | None
    seconds_left: float
    gpus: int
    memory: int
    """Bytes that PyTorch has reserved at most on any GPU; resident ones of the largest process without GPUs."""

    @property
    def mfu(self) -> float | None:
        """Share of the peak, 0 to 1; None where the peak is not known."""
        return self.flops_per_gpu / self.peak_per_gpu if self.peak_per_gpu else None

    @property
    def _speed(self) -> str:
        tokens = self.tokens_per_second / self.gpus
        return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3G}"

    def texts(self) -> list[str]:
        """For the line of a step, of each GPU or process."""
        flops = with_unit(self.flops_per_gpu, "FLOP/s") if self.mfu is None else f"MFU {self.mfu:.1%}"
        speed = f"{self._speed} tok/s/{'GPU' if runtime.has_gpu() else 'CPU'}"
        return [speed, flops, f"{self.memory / GIB:.1f} GiB", f"{duration(self.seconds_left)} left"]

    def in_megatrons_style(self) -> str:
        """For Megatron's own line; some digits, however small."""
        mfu = "" if self.mfu is None else f" MFU: {100 * self.mfu:.3G}% |"
        return (
            f"throughput per GPU (TFLOP/s/GPU): {self.flops_per_gpu / 1e12:.4G} | tokens/s/GPU: {self._speed} |{mfu}"
            f" time left: {timedelta(seconds=round(self.seconds_left))} |"
        )

    def scalars(self) -> dict[str, float]:
        """For TensorBoard and wandb."""
        found = {
            "tokens-per-second": self.tokens_per_second,
            "tokens-per-second-per-gpu": self.tokens_per_second / self.gpus,
            "tflops-per-gpu": self.flops_per_gpu / 1e12,
            "seconds-per-step": self.seconds_per_step,
            "hours-left": self.seconds_left / 3600,
        }
        if self.mfu is not None:
            found["mfu"] = self.mfu
        return {f"throughput/{name}": value for name, value in found.items()} | {"memory/peak-gib": self.memory / GIB}


def measure(iteration: int, steps: int) -> Rates:
    """The rates of the line of `iteration`, which stands for so many steps. Collective."""
    args = get_args()
    memory = torch.tensor(torch.cuda.max_memory_reserved(), device=runtime.device())
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    seconds = get_timers()("interval-time").elapsed(reset=False) / steps
    sequences = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    return Rates(
        seconds_per_step=seconds,
        tokens_per_second=sequences * args.seq_length / seconds,
        flops_per_gpu=step_positions.flops_since_line(args, sequences, steps) / steps / seconds / args.world_size,
        peak_per_gpu=peak_flops(torch.cuda.get_device_name()) if runtime.has_gpu() else None,
        seconds_left=seconds * (args.train_iters - iteration),
        gpus=args.world_size,
        memory=int(memory),
    )


def write(rates: Rates, iteration: int) -> None:
    """Write what was measured to TensorBoard and wandb, where they are used. For the process that prints the line."""
    write_scalars(step_positions.scalars() | rates.scalars(), iteration)


def close_curves() -> None:
    """Write the last points, which may else be lost with the thread that writes them. A disk in trouble is told: the
    run is over."""
    try:
        if writer := get_tensorboard_writer():
            writer.close()
    except OSError as error:
        print(f"warning: the last points of TensorBoard's curves could not be written: {error}", file=sys.stderr)


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """Points of curves, in TensorBoard and wandb where they are used."""
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if scalars and (wandb := get_wandb_writer()):
        wandb.log(scalars, iteration)
