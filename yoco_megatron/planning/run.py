"""A whole run by its tokens: steps, days, energy, failures, how often to save, and what is left of the time.

M is the mean time between failures of all GPUs, C the time that training stands still for a save, R the time from a
failure to the next new step. Saving every T = sqrt(2 C M) (Young 1974, Daly 2006) loses least, and of the time

    1 - C / T - (T / 2 + R) / M

is productive (goodput).
"""

import math
from dataclasses import dataclass

from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.memory import GIB
from yoco_megatron.costs.shape import parameter_count
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.utils.errors import require

DAY = 86400.0
CHECKPOINT_BYTES = 14  # a parameter: bf16 weight 2, fp32 weight 4, two moments 8


@dataclass(frozen=True)
class Site:
    """Of the cluster."""

    failures_per_gpu_hour: float = 3.4e-5
    """Meta's RSC-1 (arXiv 2410.21680): 6.5 failures in 1000 days of a node of eight. Llama 3 405B had 2.0e-5: 419 in 54
    days on 16,384 GPUs (arXiv 2407.21783)."""
    save_stall: float = 10.0
    """Seconds that training stands still for a save, which is written in the background. Assumed: measure yours."""
    restart: float = 600.0
    """Seconds from a failure to the first new step: noticing it, queue, start, reading the checkpoint. Assumed."""
    watts_beside: float = 0.4
    """Of a node beside its GPUs, as a share of theirs. Assumed; a DGX H100 takes 10.2 kW at most, a share of 0.8."""
    power_usage: float = 1.25
    """Of the building, over that of its computers (PUE). Assumed."""

    def __post_init__(self) -> None:
        rate = self.failures_per_gpu_hour
        require(0 < rate < 3600, f"--failures-per-gpu-hour {rate:g} must lie between 0 and 3600, one a second")
        require(0 < self.save_stall < math.inf, f"--save-stall {self.save_stall:g} must be above 0 seconds")
        require(0 <= self.restart < math.inf, f"--restart-seconds {self.restart:g} must not be negative")
        require(1 <= self.power_usage < math.inf, f"--power-usage {self.power_usage:g} must be at least 1")


@dataclass(frozen=True)
class RunPlan:
    """What a run takes; times in seconds."""

    flops: float
    steps: int
    compute: float
    """Without failures and saves."""
    goodput: float
    mean_time_between_failures: float
    save_every: float
    steps_between_saves: int
    checkpoint_bytes: float
    gpus: int
    watts: float
    """Of a GPU with its part of node and building."""

    @property
    def seconds(self) -> float:
        """With failures and saves."""
        return self.compute / self.goodput

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    @property
    def megawatt_hours(self) -> float:
        return self.gpu_hours * self.watts / 1e6

    @property
    def failures(self) -> float:
        """To be expected."""
        return self.seconds / self.mean_time_between_failures


def goodput(between_failures: float, stall: float, restart: float, save_every: float) -> float:
    """Share of the time that is productive; all in seconds. Negative where a run makes no progress."""
    return 1 - stall / save_every - (save_every / 2 + restart) / between_failures


def restart_budget(between_failures: float, stall: float, wanted: float) -> float:
    """Seconds from a failure to the next new step that leave a goodput of `wanted`, saving as often as is best;
    negative where saves and lost work alone take more."""
    every = math.sqrt(2 * stall * between_failures)
    return (1 - wanted - stall / every) * between_failures - every / 2


def plan_run(plan: Plan, tokens: int, site: Site) -> RunPlan:
    """Of `tokens` in all.

    Raises:
        ValueError: the mesh does not fit, or failures come faster than the run makes progress.
    """
    args, step = plan.args, plan.time.seconds
    require(
        plan.fits,
        f"{plan.mesh} needs {plan.memory.total / GIB:.1f} GiB of a GPU's {plan.card.memory_gib:.1f}: find a mesh by "
        "search, and add the file of its --output to --config",
    )
    steps = math.ceil(tokens / (args.global_batch_size * args.seq_length))
    between = 3600 / (site.failures_per_gpu_hour * args.world_size)
    every = max(math.sqrt(2 * site.save_stall * between), step)
    good = goodput(between, site.save_stall, site.restart, every)
    require(
        good > 0,
        f"the run makes no progress: a failure every {between / 60:.0f} min, {site.restart / 60:.0f} min to restart: "
        "lower --restart-seconds and --save-stall, or use fewer GPUs",
    )
    return RunPlan(
        flops=train_flops(plan.shape, 1) / args.seq_length * tokens,
        steps=steps,
        compute=steps * step,
        goodput=good,
        mean_time_between_failures=between,
        save_every=every,
        steps_between_saves=max(1, round(every / step)),
        checkpoint_bytes=CHECKPOINT_BYTES * float(sum(parameter_count(plan.shape).values())),
        gpus=args.world_size,
        watts=plan.card.watts * (1 + site.watts_beside) * site.power_usage,
    )
