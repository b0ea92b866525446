"""--log-throughput: tokens a second, FLOP/s, their share of the GPU's peak and the time left, for lines and curves.

The positions with a loss (step_positions.py) stand beside them.
"""

import re
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_timers
from megatron.training.global_vars import get_wandb_writer

from yoco_megatron import runtime
from yoco_megatron.costs.gpu_peak import peak_flops
from yoco_megatron.upstream import step_positions
from yoco_megatron.upstream.registry import replaces


@dataclass(frozen=True)
class Rates:
    """Of the steps since the last line, of the whole run where it does not say per GPU."""

    tokens_per_second: float
    flops_per_gpu: float
    peak_per_gpu: float | None
    seconds_left: float
    gpus: int

    @property
    def mfu(self) -> float | None:
        """Share of the peak, 0 to 1; None where the peak is not known."""
        return self.flops_per_gpu / self.peak_per_gpu if self.peak_per_gpu else None

    def text(self) -> str:
        """For the line of a step, in Megatron's style; some digits, however small."""
        mfu = "" if self.mfu is None else f" MFU: {100 * self.mfu:.3G}% |"
        tokens = self.tokens_per_second / self.gpus
        return (
            f"throughput per GPU (TFLOP/s/GPU): {self.flops_per_gpu / 1e12:.4G} |"
            f" tokens/s/GPU: {f'{tokens:,.0f}' if tokens >= 100 else f'{tokens:.3G}'} |{mfu}"
            f" time left: {timedelta(seconds=round(self.seconds_left))} |"
        )

    def scalars(self) -> dict[str, float]:
        """For TensorBoard and wandb."""
        found = {"tokens-per-second": self.tokens_per_second, "tflops-per-gpu": self.flops_per_gpu / 1e12}
        if self.mfu is not None:
            found["mfu"] = self.mfu
        return {f"throughput/{name}": value for name, value in found.items()}


_rates: Rates | None = None
"""Of the line that is about to be printed."""


def measure(iteration: int, steps: int) -> None:
    """Set the rates of the line of `iteration`, which stands for so many steps. For the process that prints it."""
    global _rates
    args = get_args()
    seconds = get_timers()("interval-time").elapsed(reset=False) / steps
    sequences = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    _rates = Rates(
        tokens_per_second=sequences * args.seq_length / seconds,
        flops_per_gpu=step_positions.flops_since_line(args, sequences, steps) / steps / seconds / args.world_size,
        peak_per_gpu=peak_flops(torch.cuda.get_device_name()) if runtime.has_gpu() else None,
        seconds_left=seconds * (args.train_iters - iteration),
        gpus=args.world_size,
    )


def write(iteration: int) -> None:
    """Write what was measured to TensorBoard and wandb, where they are used. For the process that prints the line."""
    write_scalars(step_positions.scalars() | (_rates.scalars() if _rates is not None else {}), iteration)


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """Points of curves, in TensorBoard and wandb where they are used."""
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if scalars and (wandb := get_wandb_writer()):
        wandb.log(scalars, iteration)


@replaces(
    "megatron.training.training",
    "print_rank_last",
    digest="84fa73764d1a5148",
    why="a step's line has TFLOP/s with one digit after the point, and no tokens a second, time left or positions with "
    "a loss",
)
def print_rank_last(message: str) -> None:
    if _rates is not None:
        message = re.sub(r"throughput per GPU \(TFLOP/s/GPU\): \S+ \|", _rates.text(), message)
    if re.search(r"\] iteration +\d+/", message):
        message += step_positions.text()
    print_rank_last.original(message)
