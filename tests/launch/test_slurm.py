"""Runs survive, on a real SLURM of this one machine: what docs/resilience.md promises, fault by fault.

The loss of every step, as printed, is that of the undisturbed run, in whichever attempt it was computed. All runs go at
the same time, for most of what they do is to wait.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.disks import small_disk
from support.jobs import QUICK, STEPS, Job
from support.slurm import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Stage:
    """Where one scenario is played."""

    cluster: Cluster
    folder: Path
    undisturbed: Future[Job]

    def job(self, *flags: str, **how) -> Job:
        return Job(self.cluster, self.folder / "run", *flags, **how)

    def assert_same_curve(self, job: Job) -> None:
        ours, wanted = job.losses(), self.undisturbed.result().losses()
        assert len(wanted) == STEPS and all(len(values) == 1 for values in wanted.values())
        assert ours == wanted, {
            step: (ours.get(step), wanted[step]) for step in wanted if ours.get(step) != wanted[step]
        }


def scenario(play: Callable[[Stage], None]) -> Callable:
    """The test that `play` ends well; it is played while the other scenarios are."""

    def test(plays):
        plays[play].result()

    test.__doc__, test.play = play.__doc__, play
    return test


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=6) as running:
        yield running


@pytest.fixture(scope="module")
def plays(cluster, request, tmp_path_factory):
    """Scenario -> its future, of all that are selected, in the order of this file."""
    chosen = [item.function.play for item in request.session.items if hasattr(item.function, "play")]
    with ThreadPoolExecutor(1 + len(chosen)) as pool:
        undisturbed = pool.submit(run_undisturbed, cluster, tmp_path_factory.mktemp("a folder"))
        stages = [Stage(cluster, tmp_path_factory.mktemp("run"), undisturbed) for _ in chosen]
        yield {play: pool.submit(play, stage) for play, stage in zip(chosen, stages)}


def run_undisturbed(cluster: Cluster, folder: Path) -> Job:
    job = Job(cluster, folder / "100% undisturbed", options=())
    assert job.wait_for_end() == "COMPLETED", job.report()
    return job


@scenario
def test_time_limit_saves_requeues_and_resumes(stage: Stage):
    """SLURM's own clock; torchrun, whose own shutdown must not cut the save short.

    The run is stopped at step 10 until the signal comes, so that it need not be long. Afterwards it may take its time:
    on a busy machine most of such a short limit goes into starting.
    """
    options = (*QUICK, "--launcher", "torchrun", "--save-seconds", "60")  # SLURM signals up to a minute earlier
    job = stage.job("--save-interval", "1000", minutes=2, options=options)
    job.wait(lambda: job.asked_to_leave() or job.heartbeat()["iteration"] >= 10, "step 10")
    trainers = job.trainers()
    for trainer in trainers:
        trainer.suspend()
    job.wait(job.asked_to_leave, "the signal before the time limit")
    for trainer in trainers:
        trainer.resume()
    job.wait(job.ends, "the end of the first attempt")
    stage.cluster("scontrol", "update", f"jobid={job.id}", "timelimit=30")
    assert job.wait_for_end() == "COMPLETED", job.report()
    *limited, last = job.ends()
    assert [end["kind"] for end in limited] == ["requeue"] * len(limited) and last["kind"] == "finished"
    assert 0 < limited[0]["checkpoint"] < STEPS, "saved where it was, as no save was due"
    assert "time limit or preemption: asking the run to save and leave" in job.log()
    stage.assert_same_curve(job)


@scenario
def test_hardware_fault_is_confirmed_elsewhere(stage: Stage):
    """A wrong result that comes again on the same node and does not on another: Megatron's codes 16, then 17."""
    job = stage.job("--error-injection-rate", "100", "--error-injection-type", "persistent_error")
    job.wait_for_step(1, attempt=0)
    arguments = job.folder / "train_args.txt"  # from here on only the checkpoint knows of the fault
    injected = "--error-injection-rate\n100\n--error-injection-type\npersistent_error\n"
    assert injected in arguments.read_text()
    arguments.write_text(arguments.read_text().replace(injected, ""))
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert [end["kind"] for end in job.ends()] == ["hardware", "hardware", "finished"]
    assert "code 16" in job.ends()[0]["reason"] and "code 17" in job.ends()[1]["reason"]
    (excluded,) = re.findall(r"excluded: (\S+)", job.log())
    said = [json.loads(path.read_text()) for path in (job.folder / "outcomes/0").iterdir()]
    assert sorted(excluded.split(",")) == sorted(one["host"] for one in said if one["suspect"])
    assert not set(excluded.split(",")) & set(stage.cluster.names(job.begins()[1]["nodes"]))
    stage.assert_same_curve(job)


@scenario
def test_crash_damaged_checkpoint_and_lost_node(stage: Stage):
    """kill -9 of one process, and the newest checkpoint damaged; then a node goes down."""
    job = stage.job()
    job.wait_for_step(43, attempt=0)
    job.kill(rank=1)
    newest = job.checkpoint()
    shard = job.folder / f"checkpoints/iter_{newest:07d}/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    job.wait_for_step(newest - 15, attempt=1)
    assert job.ends()[0]["kind"] == "crash" and job.ends()[0]["checkpoint"] == newest >= 40
    assert f"falling back to the checkpoint of iteration {newest - 20}" in (job.folder / "logs/1/0.log").read_text()
    lost = job.nodes()[-1]
    stage.cluster("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert job.attempts() == 3 and job.ends()[-1]["kind"] == "finished"
    stage.assert_same_curve(job)


@scenario
def test_preempted_run_saves_and_comes_back(stage: Stage):
    """A job of a partition above takes the nodes, after a grace time."""
    job = stage.job("--save-interval", "1000")
    job.wait_for_step(10, attempt=0)
    nodes = ",".join(job.nodes())
    urgent = ["--partition=urgent", f"--nodelist={nodes}", "--nodes=2", "--output=/dev/null", "--wrap", "exit 0"]
    other = stage.cluster("sbatch", "--parsable", *urgent)
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert stage.cluster.queue()[other][0] == "COMPLETED"
    first, last = job.ends()
    assert first["kind"] == "requeue" and 10 <= first["checkpoint"] < STEPS and last["kind"] == "finished"
    stage.assert_same_curve(job)


@scenario
def test_killed_while_saving(stage: Stage):
    """kill -9 as soon as a shard of step 40 is there."""
    job = stage.job()
    job.wait_for_step(25, attempt=0)
    victim = job.trainers()[0]
    job.wait(lambda: list(job.folder.glob("checkpoints/iter_0000040/*")), "the save of step 40")
    victim.kill()
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert [end["kind"] for end in job.ends()] == ["crash", "finished"]
    stage.assert_same_curve(job)


@scenario
def test_cancelled_run_saves_and_stays_away(stage: Stage):
    job = stage.job("--save-interval", "1000", nodes=1)
    job.wait_for_step(5, attempt=0)
    stage.cluster("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED"
    assert "SIGTERM: asking the run to save and leave" in job.log()
    job.wait(job.ends, "the last word")
    assert job.attempts() == 1 and 5 <= job.ends()[0]["checkpoint"] == job.checkpoint() < STEPS
    job.wait(lambda: job.status()["state"] == "stopped, not in the queue", "status.py to know")


@scenario
def test_crash_loop_stops_with_its_reason(stage: Stage):
    job = stage.job("--save-interval", "1000", nodes=1, options=(*QUICK, "--max-restarts", "1"))
    for attempt in range(2):
        job.wait_for_step(3, attempt)
        job.kill(rank=0)
    assert job.wait_for_end() == "FAILED"
    assert job.attempts() == 2 and {end["kind"] for end in job.ends()} == {"crash"}
    assert "stop 2 attempts in a row saved no new trained step" in job.log()


@scenario
def test_submitted_run_finishes_and_is_not_started_again(stage: Stage):
    """With preflight, in a folder whose name has spaces."""
    job = stage.undisturbed.result()
    assert job.attempts() == 1 and [end["kind"] for end in job.ends()] == ["finished"]
    assert job.checkpoint() == STEPS
    losses = {step: float(min(values)) for step, values in job.losses().items()}
    assert losses[STEPS] < 0.7 * losses[1], "it learns something"
    assert len(list(job.folder.glob("preflight/0/*.json"))) == 2 and not list(job.folder.glob("preflight/0/*.bad"))
    again = Job(job.cluster, job.folder)
    assert again.wait_for_end() == "COMPLETED"
    assert again.attempts() == 1, "done is done"


@scenario
def test_full_disk_stops_and_keeps_the_checkpoint(stage: Stage):
    """Room for one checkpoint and a half."""
    with small_disk(stage.folder, 1_500_000):
        job = stage.job(nodes=1)
        assert job.wait_for_end() == "FAILED"
        assert [end["kind"] for end in job.ends()] == ["storage"] and job.checkpoint() == 20


@scenario
def test_user_error_is_not_requeued(stage: Stage):
    job = stage.job("--lr-warmup-itres", "3", nodes=1)
    assert job.wait_for_end() == "FAILED"
    assert [end["kind"] for end in job.ends()] == ["user_error"]
    assert "did you mean --lr-warmup-iters" in job.ends()[0]["reason"]


@scenario
def test_unfit_node_is_left_out(stage: Stage):
    """Preflight finds a node unfit, here by a file in its name's place; the job goes on without it."""
    job = stage.job("--exit-interval", "5", nodes=1, options=("--no-check",))
    job.wait((stage.folder / "run/attempts.jsonl").exists, "the first attempt")  # preflight comes after it
    found = stage.folder / "run/preflight/0"
    found.mkdir(parents=True, exist_ok=True)
    (found / "n1.bad").write_text("n1\n")
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert "ExcNodeList=n1 " in stage.cluster("scontrol", "show", "job", "-o", job.id)
    assert job.nodes() != ["n1"] and job.ends()[-1]["kind"] == "stopped"
