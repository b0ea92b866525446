"""Runs with --run-folder, through pretrain_yoco.py in fresh processes: what happens when they are killed, damaged or
fed bad batches. The same under SLURM is in tests/launch.

Equal means equal as printed: an interrupted run computes what the undisturbed one does.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import in_writer, worlds
from support.cli import TINY, Log, _main, _script, parse, run_script, train
from support.disks import make_read_only, own_mount

from yoco_megatron.checkpoint import integrity
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.resilience import policy, run_lock
from yoco_megatron.utils.ports import free_port

STEPS = 20
SAVING = ["--save-interval", "5", "--num-workers", "0"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Log, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(1, *SAVING, "--run-folder", str(folder)), folder


def copy_of(undisturbed: tuple[Log, Path], tmp_path: Path, upto: int) -> Path:
    """The run as it was after step `upto`."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[1], run)
    for iteration in checkpoints.iterations(run / "checkpoints"):
        if iteration > upto:
            shutil.rmtree(checkpoints.path_of(run / "checkpoints", iteration))
    checkpoints.write_tracker(run / "checkpoints", upto)
    return run


def resumed(run: Path, first: int, undisturbed: tuple[Log, Path], *flags: str) -> Log:
    """Run to the end; it must start with step `first` and print what the undisturbed run printed."""
    log = train(1, *SAVING, "--run-folder", str(run), *flags)
    assert list(log.grad_norms) == list(range(first, STEPS + 1))
    assert log.grad_norms == {step: norm for step, norm in undisturbed[0].grad_norms.items() if step >= first}
    assert log.losses.items() <= undisturbed[0].losses.items()
    return log


def test_run_folder_holds_the_run(undisturbed):
    _, run = undisturbed
    beat = json.loads((run / "heartbeat.json").read_text())
    assert beat["iteration"] == STEPS and beat["tokens"] == STEPS * 8 * 32 and beat["loss"] > 0
    assert json.loads((run / "outcomes/0/0.json").read_text())["kind"] == "finished"
    assert checkpoints.iterations(run / "checkpoints") == [20, 15, 10, 5]
    for iteration in (5, 20):
        assert (checkpoints.path_of(run / "checkpoints", iteration) / checkpoints.MANIFEST).exists()
    names = {path.name for path in (run / "records/0").iterdir()}
    assert not (run / "checkpoints" / run_lock.NAME).exists()
    assert {"command.json", "resolved_config.yaml", "git_commit.txt", "packages.txt", "environment.json"} <= names


def test_damaged_newest_checkpoint(undisturbed, tmp_path):
    run = copy_of(undisturbed, tmp_path, 15)
    shard = checkpoints.path_of(run / "checkpoints", 15) / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    log = resumed(run, 11, undisturbed)
    assert (
        "falling back to the checkpoint of iteration 10: iteration 15: __0_0.distcp is not what was written" in log.text
    )
    assert integrity.find_corruption(checkpoints.path_of(run / "checkpoints", 15)) is None, "saved again, whole"


def test_no_whole_checkpoint_is_the_users_to_decide(undisturbed, tmp_path):
    run = copy_of(undisturbed, tmp_path, 5)
    (checkpoints.path_of(run / "checkpoints", 5) / "__0_0.distcp").write_bytes(b"")
    code, text = run_script(1, *TINY, *SAVING, "--run-folder", str(run))[0]
    assert code == 2 and "no checkpoint there is whole" in text
    assert json.loads((run / "outcomes/0/0.json").read_text())["kind"] == "user_error"


def _killed_at(place: str, flag: str, flags: list[str]) -> None:
    """Train, and die at a place of the background save of step 10."""
    from yoco_megatron.upstream import checkpointing
    from yoco_megatron.upstream.background_writer import BackgroundWriter

    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    write_manifest, schedule = integrity.write_manifest, BackgroundWriter.schedule_async_call

    def manifest(path, *rest):
        write_manifest(path, *rest)
        if path.name == "iter_0000010":
            die()

    def scheduled(self, request):
        writes = {"half written": in_writer.write_half, "written": in_writer.write_all}
        if "iter_0000010" not in request.async_fn_args[1][0][0]:
            return schedule(self, request)
        if place not in writes:
            return schedule(self, request)
        schedule(self, request._replace(async_fn=functools.partial(writes[place], request.async_fn, flag)))
        while not Path(flag).exists():
            time.sleep(0.01)
        die()

    checkpointing.integrity.write_manifest = manifest
    BackgroundWriter.schedule_async_call = scheduled
    _main(flags)


def start(function, *arguments) -> multiprocessing.Process:
    """One training process, that may be killed."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = worlds._server().Process(
        target=worlds._child, args=(function, 0, 1, "/nonexistent", None, env, arguments)
    )
    process.start()
    return process


@pytest.mark.parametrize("place", ["half written", "written", "before the tracker"])
def test_killed_while_saving_in_the_background(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    flags = [*TINY, *SAVING, "--async-save", "--run-folder", str(run)]
    process = start(_killed_at, place, str(tmp_path / "flag"), flags)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints.tracked_iteration(run / "checkpoints") == 5
    assert checkpoints.path_of(run / "checkpoints", 10).exists()
    resumed(run, 6, undisturbed)


def _kill_once() -> int:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kill_minus_nine

    return kill_minus_nine.main(["--kills", "1", "--steps", "30", "--save-interval", "10"])


@pytest.mark.slow
def test_killed_at_a_random_moment(tmp_path):
    """Of a run that saves in the background; 50 of them: benchmarks/kill_minus_nine.py."""
    assert worlds.spawn(_kill_once, 1, log=str(tmp_path / "log")) == [0], (tmp_path / "log.0").read_text()
    assert "1 kill" in (tmp_path / "log.0").read_text()


def _killed_beside_its_writer(pid_file: str) -> None:
    from yoco_megatron.upstream.background_writer import BackgroundWriter

    writer = BackgroundWriter._get_process(0)
    os.kill(writer.process.pid, signal.SIGTERM)
    writer.connection.send(writer.buffer.store((os.getpid, (), {})))
    assert writer.results() == [], "a signal to the whole job leaves it"
    Path(pid_file).write_text(str(writer.process.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_writer_ends_with_its_process_and_not_before(tmp_path):
    process = start(_killed_beside_its_writer, str(tmp_path / "pid"))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    end = time.monotonic() + 30
    while psutil.pid_exists(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("room", "flags"), [(0.6, []), (0.6, ["--async-save"]), (2.6, [])], ids=str)
def test_full_disk_keeps_the_old_checkpoint(room, flags, disk_of, undisturbed):
    """Room for so many checkpoints. The first cannot know its size: its writers fail. Later ones are not begun."""
    size = sum(file.stat().st_size for file in (undisturbed[1] / "checkpoints/iter_0000005").iterdir())
    run = disk_of(int(size * room)) / "run"
    policy.begin(run, 3)
    code, text = run_script(1, *TINY, *SAVING, *flags, "--run-folder", str(run))[0]
    assert code == 74 and "No space left on device" in text
    verdict = policy.end(run, code)
    if room > 1:  # else there is no room for a line either
        assert verdict.what == "stop" and "No space left on device" in verdict.reason
    saved = int(room) * 5
    assert (checkpoints.tracked_iteration(run / "checkpoints") or 0) == saved
    assert text.count("successfully saved checkpoint") == int(room)
    assert (integrity.newest_good(run / "checkpoints") or 0) == saved


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    code, text = run_script(1, *TINY, *SAVING, "--run-folder", str(tmp_path / "file"))[0]
    assert code == 2 and "--run-folder" in text and "cannot write there" in text


def _read_only_from_step_8(flags: list[str]) -> int:
    """Train on a file system that turns read-only, as the kernel makes one with errors."""
    from megatron.training import async_utils, training

    train_step = training.train_step

    def step(*args, **kwargs):
        if kwargs["iteration"] + 1 == 8:
            async_utils.maybe_finalize_async_save(blocking=True)  # of step 5
            make_read_only(Path(flags[-1], "checkpoints"))
        return train_step(*args, **kwargs)

    training.train_step = step
    return _script(flags)


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["sync", "async"])
def test_read_only_disk_keeps_the_old_checkpoint(flags, undisturbed, tmp_path):
    run = tmp_path / "run"
    with own_mount(run / "checkpoints"):
        policy.begin(run, 3)
        words = [*TINY, *SAVING, *flags, "--run-folder", str(run)]
        code, text = run_script(1, *words, entry=_read_only_from_step_8)[0]
    assert code == 74 and "Read-only file system" in text
    assert text.count("successfully saved checkpoint") == 1
    verdict = policy.end(run, code)
    assert verdict.what == "stop" and "Read-only file system" in verdict.reason
    assert checkpoints.tracked_iteration(run / "checkpoints") == 5 == integrity.newest_good(run / "checkpoints")
    resumed(run, 6, undisturbed)


def test_read_only_run_folder_is_not_started(tmp_path):
    run = tmp_path / "run"
    with own_mount(run):
        make_read_only(run)
        code, text = run_script(1, *TINY, *SAVING, "--run-folder", str(run))[0]
        assert code == 74 and "--run-folder" in text and "cannot write there (Read-only file system)" in text
        command = [sys.executable, "-m", "yoco_megatron.resilience.policy", "begin", str(run)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Read-only file system" in done.stderr


def test_keep_checkpoints(undisturbed, tmp_path):
    run = copy_of(undisturbed, tmp_path, 5)
    resumed(run, 6, undisturbed, "--keep-checkpoints", "2", "--keep-every", "10")
    assert checkpoints.iterations(run / "checkpoints") == [20, 15, 10]


def _with_bad_steps(bad: dict[int, float], flags: list[str], rank: int) -> None:
    """Train, with the gradient of some steps multiplied, or made NaN; of all ranks or of one."""
    from megatron.training import training

    from yoco_megatron.training import step

    forward = step.loss_func
    train_step = training.train_step
    now = {}

    def numbered(*args, **kwargs):
        now["step"] = kwargs["iteration"] + 1
        return train_step(*args, **kwargs)

    def worse(*args):
        loss, tokens, report = forward(*args)
        here = rank in (-1, int(os.environ["RANK"]))
        return loss * (bad.get(now.get("step"), 1.0) if here else 1.0), tokens, report

    training.train_step = numbered
    step.loss_func = worse
    _main(flags)


MESHES = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
}
GUARDED = ["--guard-sigmas", "6", "--guard-window", "8", "--guard-patience", "3"]


def guarded(run: Path, bad: dict[int, float], *flags: str, attempt: str = "0", world: int = 1, rank: int = -1) -> Log:
    """Train with bad steps, on one rank alone if it is named; the last rank's figures, all ranks' text."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "YOCO_ATTEMPT": attempt}
    words = [*TINY, *SAVING, *GUARDED, "--run-folder", str(run), *flags]
    worlds.spawn(_with_bad_steps, world, (bad, words, rank), log=str(run.parent / "log"), env=rendezvous)
    texts = [(run.parent / f"log.{one}").read_text() for one in range(world)]
    return dataclasses.replace(parse(texts[-1]), text="".join(texts))


@pytest.mark.parametrize("factor", [float("nan"), 1e4], ids=["NaN", "spike"])
def test_bad_step_changes_nothing(factor, tmp_path):
    log = guarded(tmp_path / "run", {12: factor})
    assert "guard: step 12 skipped" in log.text and log.text.count("guard: step") == 1
    assert log.text.count("  skipped 1  ") == 1
    assert list(log.losses) == [step for step in range(1, STEPS + 1) if step != 12], "it has none, not one of 0"
    assert log.loss(STEPS) < log.loss(11), "it goes on learning"


def test_guard_without_bad_steps_changes_nothing(undisturbed, tmp_path):
    log = guarded(tmp_path / "run", {}, "--guard-sigmas", "50")
    assert log.losses == undisturbed[0].losses and log.grad_norms == undisturbed[0].grad_norms


def test_divergence_rolls_back_and_leaves_the_batches_out(tmp_path):
    run = tmp_path / "run"
    policy.begin(run, 3)
    log = guarded(run, dict.fromkeys(range(11, 20), 1e4))
    assert "3 bad steps in a row up to 13: back to 10, without its batches" in log.text
    assert policy.end(run, 0).what == "requeue"
    assert checkpoints.tracked_iteration(run / "checkpoints") == 10
    again = guarded(run, {11: 1e4, 12: 1e4, 13: 1e4}, attempt=policy.begin(run, 3)[0].reason)
    assert list(again.grad_norms) == list(range(14, STEPS + 1)), "batches 11 to 13 are not used"
    assert "guard: step" not in again.text
    assert policy.end(run, 0) == policy.Verdict("done", policy.attempts(run)[-1]["reason"])


def test_rolling_back_is_final(tmp_path):
    """What is being saved when the guard decides, and what an earlier attempt has saved, is never loaded again."""
    run, nan = tmp_path / "run", float("nan")
    saving = ["--async-save", "--save-interval", "4"]
    for attempt, bad in ((0, (3, 4, 5)), (1, (6, 7, 8))):
        log = guarded(run, dict.fromkeys(bad, nan), *saving, attempt=str(attempt))
        assert f"3 bad steps in a row up to {bad[-1]}: back to 0, without its batches" in log.text
        assert "loading distributed checkpoint" not in log.text
        assert ("successfully saved checkpoint from iteration       4" in log.text) == (attempt == 0)
    assert json.loads((run / "skipped_iterations.json").read_text()) == list(range(1, 9))
    assert integrity.newest_good(run / "checkpoints") is None


def test_going_back_by_hand_is_final(undisturbed, tmp_path):
    """--ckpt-step 5, another way from there: a rollback then does not find checkpoints 10 and 15 of the old one."""
    run = copy_of(undisturbed, tmp_path, 15)
    bad = dict.fromkeys((16, 17, 18), float("nan"))
    log = guarded(run, bad, "--ckpt-step", "5", "--save-interval", "7", attempt="1")
    assert "back to 14, without its batches" in log.text and checkpoints.iterations(run / "checkpoints") == [14, 7, 5]
    code, text = run_script(1, *TINY, *SAVING, "--run-folder", str(run), "--ckpt-step", "15")[0]
    assert code == 2 and "--ckpt-step 15" in text and "see abandoned there" in text


def test_transient_fault_excludes_its_node(undisturbed, tmp_path):
    """A wrong result, injected by Megatron, that running the step again does not give."""
    run = tmp_path / "run"
    flags = [*TINY, *SAVING, "--run-folder", str(run), "--error-injection-rate", "20"]
    policy.begin(run, 3)
    code, text = run_script(1, *flags, "--error-injection-type", "transient_error", env={"SLURMD_NODENAME": "n7"})[0]
    assert code == 17 and "Possible transient error" in text
    verdict = policy.end(run, code)
    assert verdict.what == "requeue" and verdict.exclude == ["n7"] and "code 17" in verdict.reason
    resumed(run, (checkpoints.tracked_iteration(run / "checkpoints") or 0) + 1, undisturbed)


def test_divergence_blames_no_node(tmp_path):
    """NaN on all ranks is not their hardware's; the weights that gave it are not saved; the second time it is over."""
    run = tmp_path / "run"
    words = [*TINY, *SAVING, "--lr", "1e30", "--lr-warmup-iters", "0", "--run-folder", str(run)]
    for attempt, verdict in enumerate(("requeue", "stop")):
        policy.begin(run, 3)
        env = {"YOCO_ATTEMPT": str(attempt)}
        ended = run_script(2, *words, env=env)
        assert [code for code, _ in ended] == [17, 17] and "diverged in step 2: found NaN" in ended[0][1]
        found = policy.end(run, 17)
        assert (found.what, found.exclude) == (verdict, []) and "diverged in step 2" in found.reason
    assert checkpoints.iterations(run / "checkpoints") == []


def test_nan_in_the_first_step_is_not_saved(tmp_path):
    """Megatron checks nothing in an attempt's first step."""
    run = tmp_path / "run"
    words = [*TINY, "--save-interval", "1", "--num-workers", "0", "--run-folder", str(run)]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(AssertionError, match="17"):
        worlds.spawn(_with_bad_steps, 1, ({1: float("nan")}, words, -1), env=rendezvous)
    said = json.loads((run / "outcomes/0/0.json").read_text())
    assert (said["kind"], said["reason"]) == ("diverged", "diverged in step 1: gradient norm nan")
    assert checkpoints.iterations(run / "checkpoints") == []


def test_run_that_trained_nothing_is_not_done(tmp_path):
    run = tmp_path / "run"
    policy.begin(run, 3)
    skip = ["--train-iters", "4", "--iterations-to-skip", "1", "2", "3", "4"]
    ((code, text),) = run_script(1, *TINY, *SAVING, *skip, "--run-folder", str(run))
    assert code == 1 and "none of the steps 1 to 4 changed the weights" in text
    assert policy.end(run, code).what == "stop"


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory) -> tuple[Log, Log]:
    return _roll_back(tmp_path_factory.mktemp("one") / "run", 1)


def _roll_back(run: Path, world: int, *flags: str) -> tuple[Log, Log]:
    """A NaN in step 6, on the last rank alone, and a divergence from step 11; then the attempt after it."""
    policy.begin(run, 3)
    bad = {6: float("nan")} | dict.fromkeys(range(11, 20), 1e4)
    first = guarded(run, bad, *flags, world=world, rank=world - 1)
    assert policy.end(run, 0).what == "requeue"
    assert checkpoints.tracked_iteration(run / "checkpoints") == 10
    return first, guarded(run, {}, *flags, world=world, attempt=policy.begin(run, 3)[0].reason)


@pytest.mark.parametrize("mesh", MESHES)
def test_guard_acts_as_in_one_process(mesh, rolled_back, tmp_path):
    """Wherever the bad gradient arises, all ranks skip the same steps and roll back together.

    Replicas that had not would differ in weights and so in the losses after it.
    """
    runs = _roll_back(tmp_path / "run", 2, *MESHES[mesh])
    for ours, reference in zip(runs, rolled_back):
        said = re.compile(r"guard: (?:step \d+ skipped|.* back to 10.*)")
        assert said.findall(ours.text) == said.findall(reference.text)
        assert ours.grad_norms.keys() == reference.grad_norms.keys()
        assert ours.losses.keys() == reference.losses.keys()
        for step in ours.losses:
            assert ours.loss(step) == pytest.approx(reference.loss(step), rel=1e-5), step


def _hanging(flags: list[str]) -> None:
    from megatron.training import training

    train_step = training.train_step

    def stuck(*args, **kwargs):
        if kwargs["iteration"] == 7 and int(os.environ["RANK"]) == 1:
            _sleep_here_for_ever()
        return train_step(*args, **kwargs)

    training.train_step = stuck
    from yoco_megatron.resilience import watchdog

    watchdog.GRACE_S = 2
    _main(flags)


def _sleep_here_for_ever() -> None:
    while True:
        time.sleep(0.1)


def test_hang_ends_with_the_stacks_of_all_processes(tmp_path):
    run = tmp_path / "run"
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    policy.begin(run, 3)
    flags = [*TINY, *SAVING, "--run-folder", str(run), "--hang-timeout", "0.05"]
    with pytest.raises(AssertionError, match=rf"exit codes \[-{signal.SIGALRM:d}, -{signal.SIGALRM:d}\]"):
        worlds.spawn(_hanging, 2, (flags,), env=rendezvous)
    assert "_sleep_here_for_ever" in (run / "stacks/0/1.txt").read_text()
    assert "torch/distributed/distributed_c10d.py" in (run / "stacks/0/0.txt").read_text(), "waits for the other"
    verdict = policy.end(run, 142)
    assert verdict.what == "requeue" and "2 processes hung" in verdict.reason


def _triggered(run: str, flags: list[str]) -> None:
    """Make trigger files at certain steps."""
    from megatron.training import training

    from yoco_megatron.resilience import triggers

    train_step = training.train_step
    triggers.Triggers.__init__.__defaults__ = (0.0,)  # look at every step

    def trigger(*args, **kwargs):
        name = {3: "save", 6: "profile", 12: "exit"}.get(kwargs["iteration"] + 1)
        if name and os.environ["RANK"] == "0":
            Path(run, "triggers", name).touch()
        return train_step(*args, **kwargs)

    training.train_step = trigger
    _main(flags)


def test_trigger_files(tmp_path):
    run = tmp_path / "run"
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    policy.begin(run, 3)
    flags = [*TINY, "--num-workers", "0", "--save-interval", "100", "--run-folder", str(run)]
    worlds.spawn(_triggered, 2, (str(run), flags), env=rendezvous)
    assert checkpoints.iterations(run / "checkpoints") == [12, 3]
    assert list((run / "triggers").iterdir()) == []
    assert len(list((run / "profile").glob("*.json"))) == 1
    assert policy.end(run, 0).what == "done" and policy.attempts(run)[-1]["kind"] == "stopped"


def test_script_says_requeue_after_a_signal(tmp_path):
    """The flag that Megatron polls, set by a signal; exit code 0, and the outcome says the rest."""
    run = tmp_path / "run"
    process = start(_script, [*TINY, *SAVING, "--train-iters", "4000", "--run-folder", str(run)])
    end = time.monotonic() + 120
    while not (run / "heartbeat.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = json.loads((run / "outcomes/0/0.json").read_text())
    assert said["kind"] == "requeue" and said["iteration"] == checkpoints.tracked_iteration(run / "checkpoints")
