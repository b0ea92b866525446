"""Runs survive, on a real SLURM of this one machine: what docs/resilience.md promises, fault by fault.

The loss of every step, as printed, is that of the undisturbed run, in whichever attempt it was computed.
"""

import pytest
from support.jobs import STEPS, Job
from support.slurm import Cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


QUICK = ("--no-check", "--no-preflight")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("run") / "undisturbed")
    assert job.wait_for_end() == "COMPLETED", job.report()
    return job


def assert_same_curve(job: Job, undisturbed: Job) -> None:
    ours, wanted = job.losses(), undisturbed.losses()
    assert len(wanted) == STEPS - 1 and all(len(values) == 1 for values in wanted.values())
    # Each attempt prints the mean of its first two steps for the second, which `losses` leaves out.
    assert len(wanted.keys() - ours.keys()) < job.attempts()
    different = {step: (ours[step], wanted[step]) for step in wanted if step in ours and ours[step] != wanted[step]}
    assert not different


def test_submitted_run_finishes_and_is_not_started_again(undisturbed):
    job = undisturbed
    assert job.attempts() == 1 and [end["kind"] for end in job.ends()] == ["finished"]
    assert job.checkpoint() == STEPS
    losses = {step: float(min(values)) for step, values in job.losses().items()}
    assert losses[STEPS] < 0.7 * losses[1], "it learns something"
    again = Job(job.cluster, job.folder)
    assert again.wait_for_end() == "COMPLETED"
    assert again.attempts() == 1, "done is done"
    assert (job.folder / "preflight/0/n1.json").exists() and not list(job.folder.glob("preflight/0/*.bad"))


def test_time_limit_saves_requeues_and_resumes(cluster, undisturbed, tmp_path):
    """What SLURM sends before the time limit, sent now; torchrun, whose own shutdown must not cut the save short."""
    job = Job(cluster, tmp_path / "run", options=("--launcher", "torchrun", *QUICK))
    job.wait_for_step(10, attempt=0)
    cluster("scancel", "--signal=USR1", "--batch", job.id)
    assert job.wait_for_end() == "COMPLETED", job.report()
    first, second = job.ends()
    assert first["kind"] == "requeue" and first["checkpoint"] % 40 != 0, "saved where it was, not where it would"
    assert second["kind"] == "finished" and job.attempts() == 2
    assert_same_curve(job, undisturbed)


def test_crash_damaged_checkpoint_and_lost_node(cluster, undisturbed, tmp_path):
    """kill -9 of one process, and the newest checkpoint damaged; then a node goes down."""
    job = Job(cluster, tmp_path / "run", options=QUICK)
    job.wait_for_step(85, attempt=0)
    job.kill(rank=1)
    shard = job.folder / "checkpoints/iter_0000080/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    job.wait_for_step(85, attempt=1)
    assert job.ends()[0]["kind"] == "crash" and job.ends()[0]["checkpoint"] == 80
    assert "falling back to the checkpoint of iteration 40" in (job.folder / "logs/1/0.log").read_text()
    lost = cluster("scontrol", "show", "hostnames", job.nodes()).split()[-1]
    cluster("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert job.attempts() == 3 and job.ends()[-1]["kind"] == "finished"
    assert_same_curve(job, undisturbed)


def test_crash_loop_stops_with_its_reason(cluster, tmp_path):
    """Data that end before the first checkpoint, at every attempt."""
    job = Job(cluster, tmp_path / "run", "--save-interval", "1000", options=(*QUICK, "--max-restarts", "1"))
    for attempt in range(2):
        job.wait_for_step(3, attempt)
        job.kill(rank=0)
    assert job.wait_for_end() == "FAILED"
    assert job.attempts() == 2 and {end["kind"] for end in job.ends()} == {"crash"}
    log = (job.folder / f"logs/job-{job.id}.log").read_text()
    assert "stop 2 attempts in a row ended without a new checkpoint" in log


def test_killed_while_saving(cluster, undisturbed, tmp_path):
    """kill -9 as soon as a shard of step 80 is there."""
    job = Job(cluster, tmp_path / "run", options=QUICK)
    job.wait_for_step(60, attempt=0)
    victim = job.trainers()[0]
    job.wait(lambda: list(job.folder.glob("checkpoints/iter_0000080/*")), "the save of step 80")
    victim.kill()
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert [end["kind"] for end in job.ends()] == ["crash", "finished"]
    assert_same_curve(job, undisturbed)


def test_full_disk_stops_and_keeps_the_checkpoint(cluster, tmp_path, disk_of):
    """Room for one checkpoint and a half."""
    run = disk_of(1_500_000) / "run"
    job = Job(cluster, run, options=QUICK)
    assert job.wait_for_end() == "FAILED"
    assert [end["kind"] for end in job.ends()] == ["storage"] and job.checkpoint() == 40


def test_user_error_is_not_requeued(cluster, tmp_path):
    job = Job(cluster, tmp_path / "run", "--lr-warmup-itres", "3", options=QUICK)
    assert job.wait_for_end() == "FAILED"
    assert [end["kind"] for end in job.ends()] == ["user_error"]
    assert "did you mean --lr-warmup-iters" in job.ends()[0]["reason"]


def test_unfit_node_is_left_out(cluster, tmp_path):
    """Preflight finds a node unfit, here by a file in its name's place; the job goes on without it."""
    job = Job(cluster, tmp_path / "run", "--exit-interval", "5", options=("--no-check",))
    (job.folder / "preflight/0").mkdir(parents=True)
    (job.folder / "preflight/0/n1.bad").write_text("n1\n")
    assert job.wait_for_end() == "COMPLETED", job.report()
    assert "n1" not in cluster("scontrol", "show", "hostnames", job.nodes()).split()
    assert job.ends()[-1]["kind"] == "stopped"
