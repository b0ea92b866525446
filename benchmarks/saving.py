"""How long training stands still for a checkpoint: saved in the background, and synchronously, beside no save at all.

    python benchmarks/saving.py --yoco-flags=--recompute-elementwise  # 3B: 48 GB, once on disk, twice in memory
    python benchmarks/saving.py --layers 8                            # 20 GB
    torchrun --nproc-per-node 2 benchmarks/saving.py --layers 8       # data parallel

All in one run of pretrain_yoco.py, in turns: --steps steps without a save, then a save in the background and steps
until it is complete, at least as many, then a synchronous save and as many steps. What a save costs is the time of its
steps less as many times the median step without a save. The first save in the background is told apart, as it allocates
the host memory that later ones use again. A checkpoint is removed, untimed, as soon as it is complete.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cases import add_arguments, flags_of, title
from mesh import Mesh
from record import record
from runs import MOCK

MODES = ("none", "background", "synchronous")
WARM_UP = 6  # steps


def cost_of_save(block_s: float, steps: int, step_s: float) -> float:
    """Seconds of a block of steps with a save that are not its steps' own."""
    return block_s - steps * step_s


class Turns:
    """Called after each step: saves in turn, and notes what it took."""

    def __init__(self, rounds: int, steps: int, seconds: float, folder: Path) -> None:
        self.turns = [mode for _ in range(rounds) for mode in MODES]
        self.steps, self.end, self.folder = steps, time.monotonic() + seconds, folder
        self.plain: list[float] = []  # seconds of each step without a save
        self.saves: list[dict[str, Any]] = []
        self.mode = "warm-up"
        self.marks: list[float] = []

    def after_step(
        self, model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: float, context: Any, data: Any
    ) -> bool:
        """In the place of Megatron's `checkpoint_and_decide_exit`; whether to leave."""
        import torch
        from megatron.training import async_utils, get_args, training

        torch.cuda.synchronize()
        now = time.perf_counter()
        self.marks.append(now)
        count = len(self.marks) - 1
        complete = async_utils.is_empty_async_queue()
        if self.mode == "background" and complete:
            self.saves[-1].setdefault("complete", now - self.marks[0])
        if count < (WARM_UP if self.mode == "warm-up" else self.steps) or not complete:
            return False
        if self.mode == "none":
            self.plain += [later - earlier for earlier, later in zip(self.marks, self.marks[1:])]
        elif self.mode != "warm-up":
            steps = [later - earlier for earlier, later in zip(self.marks, self.marks[1:])]
            self.saves[-1] |= {"block": now - self.marks[0], "count": count, "longest": max(steps)}
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                (path,) = self.folder.glob("iter_*")
                self.saves[-1]["bytes"] = sum(file.stat().st_size for file in path.iterdir())
                print(f"{self.mode}: {self.saves[-1]}", flush=True)
                shutil.rmtree(path)
        out_of_time = torch.tensor(float(time.monotonic() > self.end and len(self.saves) >= 3), device="cuda")
        torch.distributed.all_reduce(out_of_time)
        if not self.turns or out_of_time.item():
            return True
        self.mode = self.turns.pop(0)
        torch.distributed.barrier()
        self.marks = [time.perf_counter()]
        if self.mode != "none":
            self.saves.append({"mode": self.mode})
            get_args().async_save = self.mode == "background"
            training.save_checkpoint_and_time(
                iteration, model, optimizer, scheduler, flops, context, train_data_iterator=data
            )
            self.saves[-1]["call"] = time.perf_counter() - self.marks[0]
            get_args().async_save = True  # else Megatron does not ask whether the save is complete
        return False

    def report(self, case: str, device: str, output: Path) -> None:
        """Print and record the medians."""
        step = median(self.plain)
        for save in self.saves:
            if "block" in save:
                save["cost"] = cost_of_save(save["block"], save["count"], step)
        done = {mode: [save for save in self.saves if save["mode"] == mode and "cost" in save] for mode in MODES[1:]}
        (first, *later), synchronous = done["background"], done["synchronous"]
        size = f"{self.saves[0]['bytes'] / 1e9:.1f} GB"
        common = dict(benchmark="saving", case=f"{case}, {size}, step {step * 1e3:.0f} ms", device=device, unit="s")

        def middle(saves: list[dict[str, Any]], what: str) -> float:
            return round(median(save[what] for save in saves), 3)

        costs = f"a save costs training, median of {len(later or [first])} and {len(synchronous)}"
        in_turn = dict(peer="synchronous", higher_is_better=False) | common
        rows = [
            dict(
                metric=costs, value=middle(later or [first], "cost"), peer_value=middle(synchronous, "cost"), **in_turn
            ),
            dict(metric="longest step with a save", value=middle(later or [first], "longest"), **common),
            dict(metric="the call that saves", value=middle(later or [first], "call"), **in_turn)
            | dict(peer_value=middle(synchronous, "call")),
            dict(metric="the first save in the background costs", value=round(first["cost"], 3), **common),
            dict(metric="until it is complete", value=middle(later or [first], "complete"), **common),
        ]
        for row in rows:
            print(
                f"{row['case']}: {row['metric']}: {row['value']} s (synchronous: {row.get('peer_value')})", flush=True
            )
            record(output, **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(steps=8, batch_tokens=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of the three turns")
    parser.add_argument("--seconds", type=float, default=280, help="begin no further turn after so many")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints go; by default the system's temporary folder"
    )
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = Mesh.of("1" if world == 1 else f"DP{world}")
    steps, options.steps = options.steps, 10**9  # of --exit-interval: the turns end the run
    name = "gated_retention"
    flags = flags_of(name, options.length, "bf16", options.micro_batch, mesh, options)
    case = title(name, options.length, "bf16", mesh, options)

    from yoco_megatron.startup.load_run import set_environment_of_one_process
    from yoco_megatron.startup.prepare import prepare

    prepare()
    set_environment_of_one_process()
    import torch
    from megatron.training import training

    import pretrain_yoco
    from yoco_megatron import runtime

    folder = (options.folder or Path(tempfile.gettempdir())) / f"saving-{os.environ['MASTER_PORT']}"  # on all ranks
    turns = Turns(options.rounds, steps, options.seconds, folder)
    training.checkpoint_and_decide_exit = turns.after_step
    saving = ["--async-save", "--save", str(folder), "--save-interval", str(10**9)]
    try:
        pretrain_yoco.main([*MOCK.split(), *flags.split(), *saving])
    except SystemExit as left:
        if left.code:
            raise
    finally:
        if int(os.environ["RANK"]) == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if int(os.environ["RANK"]) == 0:
        device = torch.cuda.get_device_name() if runtime.has_gpu() else "CPU"
        turns.report(case, f"{world}x {device}" if world > 1 else device, options.output)


if __name__ == "__main__":
    main()
