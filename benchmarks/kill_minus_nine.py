"""Kill a run that saves in the background every few steps with SIGKILL, at random moments; each restart must go on.

    python benchmarks/kill_minus_nine.py                 # 50 kills of a tiny model on a CPU, ten minutes on two cores
    python benchmarks/kill_minus_nine.py --kills 3 --steps 60

First a run that nobody disturbs. Then attempts in one run folder, each killed some time after it began, drawn evenly
from 0 to twice the time until the first save was complete; when the run has finished, another one begins. Checked:
each attempt starts from a checkpoint no older than the last one that was reported as saved, prints the undisturbed
run's loss and gradient norm for every step, digit by digit, and leaves no process behind. Ends with 1 if one does not.
"""

import argparse
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # forks of this process, as preloaded.py

import psutil
from record import record

import pretrain_yoco
import yoco_megatron.model.yoco_model  # noqa: F401
from yoco_megatron.utils.ports import free_port

MODEL = """--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --self-decoder-heads 2
    --seq-length 32 --micro-batch-size 2 --global-batch-size 2 --lr 1e-2 --lr-warmup-iters 3 --eval-iters 0
    --log-interval 1 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 255"""
STEP = re.compile(r" (\d+)/\d+  lm loss (\S+)  norm (\S+) ")
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
LOG = "attempt.log"


def start(run: Path, flags: list[str]) -> int:
    """An attempt in a process of its own, which prints into RUN/attempt.log; its id."""
    run.mkdir(exist_ok=True)
    port = str(free_port())
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(run / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.setpgid(0, 0)
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= world
    code = 0
    try:
        pretrain_yoco.main([*shlex.split(MODEL), *flags, "--run-folder", str(run)])
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Its exit code; None if it still runs after so long."""
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def left_behind(group: int, seconds: float = 20) -> list[int]:
    """Processes of an attempt that are still there after so long."""
    end = time.monotonic() + seconds
    while True:
        alive = [
            one.pid
            for one in psutil.process_iter(["pid", "status"])
            if one.info["status"] != psutil.STATUS_ZOMBIE and _group_of(one.pid) == group
        ]
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.05)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def read(run: Path) -> tuple[dict[int, tuple[str, str]], list[int], str]:
    """({step: (loss, gradient norm)}, iterations that were reported as saved, the whole text) of an attempt."""
    text = (run / LOG).read_text()
    steps = {int(step): (loss, norm) for step, loss, norm in STEP.findall(text)}
    return steps, [int(one) for one in SAVED.findall(text)], text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-interval", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="record a row there")
    options = parser.parse_args(argv)
    flags = ["--async-save", "--save-interval", str(options.save_interval), "--train-iters", str(options.steps)]
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "undisturbed"
        began = time.monotonic()
        child = start(run, flags)
        while not SAVED.search((run / LOG).read_text() if (run / LOG).exists() else ""):
            time.sleep(0.05)
        longest = 2 * (time.monotonic() - began)
        code = wait(child, 600)
        wanted, _, text = read(run)
        assert code == 0 and len(wanted) == options.steps, text[-3000:]
        print(f"undisturbed: {len(wanted)} steps; kills come 0 to {longest:.1f} s after the start", flush=True)
        kills = resumed = in_a_save = runs = 0
        saved = 0  # the newest checkpoint that an attempt has reported
        run = Path(folder) / "run0"
        while kills < options.kills:
            child = start(run, flags)
            code = wait(child, moments.uniform(0, longest))
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
            remaining = left_behind(child)
            steps, reported, text = read(run)
            first = min(steps, default=None)
            wrong = {step: (found, wanted[step]) for step, found in steps.items() if found != wanted[step]}
            resumed += first is not None and first > 1
            in_a_save += code is None and text.count("scheduled an async checkpoint") > len(reported)
            if code or wrong or remaining or (first is not None and first <= saved):
                print(
                    f"WRONG: exit {code}, saved {saved}, first step {first}, left {remaining}, {wrong}\n{text[-4000:]}"
                )
                return 1
            saved = max([saved, *reported])
            print(f"kill {kills}: steps {first} to {max(steps, default=None)}, saved {saved}", flush=True)
            if code == 0:
                runs, saved = runs + 1, 0
                run = Path(folder) / f"run{runs}"
    print(
        f"{kills} kills, {in_a_save} of them during a save, {runs} runs finished: {resumed} attempts went on from a "
        "checkpoint, each with the undisturbed run's losses; no process was left behind",
        flush=True,
    )
    if options.output:
        record(
            options.output,
            benchmark="kill -9",
            case=f"a save in the background every {options.save_interval} steps; {kills} kills, {in_a_save} in a save",
            metric="attempts that went on from a checkpoint with the undisturbed run's losses, all that did",
            unit="",
            value=resumed,
            device="CPU",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
