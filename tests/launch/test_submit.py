"""launch/slurm/submit.py: the plan, the script, and every mistake before a job is queued."""

import contextlib
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import TINY, parsed

from yoco_megatron.resilience.launch_environment import launch_environment

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launch/slurm/submit.py"
spec = importlib.util.spec_from_file_location("submit", SUBMIT)
submit_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(submit_py)
FLAGS = [*TINY, "--save-interval", "10"]
HEADS4 = ["--num-query-groups", "4", "--self-decoder-heads", "4"]
BIG = ["--config", str(ROOT / "configs/model/yoco_13b.yaml"), str(ROOT / "configs/recipe/scaling_large.yaml")]
BIG += ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100000", "--save-interval", "500"]


def submit(*words: str, nodes: int = 1, cluster: str = "cpu") -> subprocess.CompletedProcess:
    """What submit.py does with these words; in this process, whose imports it needs."""
    command = ["--run-folder", "/nowhere/run", "--time", "1:00:00", "--dry-run"]
    command += ["--nodes", str(nodes), "--cluster", str(ROOT / f"configs/cluster/{cluster}.yaml"), *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = submit_py.run(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def test_environment_by_generation_and_mode():
    tp2 = parsed(2, "--tensor-model-parallel-size", "2")
    assert launch_environment("hopper", tp2, "/run")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert launch_environment("blackwell", tp2, "/run")["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert launch_environment("hopper", parsed(2), "/run")["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    tp2.use_megatron_fsdp = True
    assert launch_environment("hopper", tp2, "/run")["CUDA_DEVICE_MAX_CONNECTIONS"] != "1"
    assert not [name for name in launch_environment("none", tp2, "/run") if "NCCL" in name]
    with pytest.raises(ValueError, match="gpu 'volta'"):
        launch_environment("volta", tp2, "/run")


def test_dry_run_shows_plan_and_script():
    done = submit(*FLAGS, "--job-name", "x", "--partition", "big", "--sbatch", "exclusive", nodes=2)
    assert done.returncode == 0, done.stderr
    assert "2 nodes x 2 = 4 processes: tensor 1 x pipeline 1 x context 1 x data 4" in done.stdout
    for line in ("#SBATCH --nodes=2", "#SBATCH --partition=big", "#SBATCH --exclusive", "#SBATCH --requeue"):
        assert line in done.stdout.splitlines()
    assert "#SBATCH --signal=B:USR1@300" in done.stdout and "gpus-per-node" not in done.stdout
    assert not Path("/nowhere").exists()
    script = done.stdout[done.stdout.index("#!/usr/bin/env bash") :]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("9:30", 570), ("4:00:00", 14400), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_time_limits_as_sbatch_reads_them(text, seconds):
    done = submit("--no-check", *FLAGS, "--time", text, "--save-seconds", str(seconds - 60))
    assert done.returncode == 0, done.stderr
    done = submit("--no-check", *FLAGS, "--time", text, "--save-seconds", str(seconds - 59))
    assert done.returncode == 2 and "leaves no time" in done.stderr


def test_folder_with_spaces_and_percent_signs():
    """What sbatch makes of it, tests/launch shows."""
    done = submit("--no-check", "--run-folder", "/nowhere/100% mine/it's", *FLAGS)
    (line,) = [line for line in done.stdout.splitlines() if "--output" in line and line.startswith("#SBATCH")]
    assert shlex.split(line, comments=False)[1] == "--output=/nowhere/100%% mine/it's/logs/job-%j.log"


def test_shell_in_any_value_is_text(tmp_path):
    """The head of the script is run: it makes variables, and nothing else."""
    text = f"$(touch {tmp_path}/made) `touch {tmp_path}/made`; touch {tmp_path}/made # 'x\" $HOME"
    settings = {"gpu": "none", "gpus-per-node": 1, "python": text, "env": {"A": text}, "sbatch": {"comment": text}}
    (tmp_path / "site.yaml").write_text(json.dumps(settings | {"container": {"image": text}}))
    flags = ["--cluster", str(tmp_path / "site.yaml"), "--run-folder", f"/nowhere/{text}", "--job-name", text]
    done = submit("--no-check", *flags, "--partition", text, "--account", text, "--sbatch", f"qos={text}", *FLAGS)
    assert done.returncode == 0, done.stderr
    head = done.stdout[done.stdout.index("#!") :].partition("\n# One attempt")[0]
    shown = 'echo "$A"; echo "$PYTHON"; echo "$RUN_FOLDER"; echo "$CONTAINER_IMAGE"'
    ran = subprocess.run(["bash", "-c", f"{head}\n{shown}"], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [text, text, f"/nowhere/{text}", text] and not ran.stderr
    assert not (tmp_path / "made").exists()
    assert sum(text.split("'")[0] in line for line in head.splitlines() if line.startswith("#SBATCH")) == 6


def test_no_sbatch_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    cluster = str(ROOT / "configs/cluster/cpu.yaml")
    flags = ["--nodes", "1", "--time", "1:00:00", "--cluster", cluster, "--run-folder", str(tmp_path / "run"), *FLAGS]
    assert submit_py.run(flags) == 2 and "no sbatch on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_no_formula_counts_is_no_reason_to_refuse():
    flags = [*BIG, "--micro-batch-size", "2", "--use-distributed-optimizer", "--grad-reduce-in-bf16"]
    done = submit(*flags, nodes=8, cluster="h100")
    assert done.returncode == 0, done.stderr
    assert "WARNING: --grad-reduce-in-bf16 is not counted" in done.stdout and "optimizer-cpu" not in done.stdout


def test_the_job_is_written_down(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho '4242;somewhere'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cluster = str(ROOT / "configs/cluster/cpu.yaml")
    flags = ["--nodes", "1", "--time", "1:00:00", "--cluster", cluster, "--run-folder", str(tmp_path / "run"), *FLAGS]
    assert submit_py.run(flags) == 0
    assert (tmp_path / "run/submitted.txt").read_text() == "4242\n"  # status.py reads it


def test_what_a_container_lacks_is_in_the_plan(tmp_path):
    cluster = {"gpu": "none", "gpus-per-node": 1, "python": "/usr/bin/python3", "container": {"image": "x"}}
    (tmp_path / "site.yaml").write_text(json.dumps(cluster))
    words = ["--cluster", str(tmp_path / "site.yaml"), *FLAGS, "--data-cache-path", "/elsewhere/cache"]
    done = submit(*words)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "WARNING: the container" in line] == [
        "WARNING: the container will not have /elsewhere/cache: mount it (--container-mounts), or name what is inside"
    ]
    assert "WARNING: the container" not in submit(*words, "--container-mounts", "/:/").stdout


@pytest.mark.parametrize(
    ("mounts", "warning"),
    [
        (
            "{tmp}:/elsewhere",
            "the container will not have {tmp}/cache",
        ),  # a path of the container counts, not one outside
        ("{tmp}:{tmp},/:/", None),
        ("/:/,{tmp}/none:/none", "this machine has no {tmp}/none, which is to be mounted"),
        ("/:/:ro", "the container cannot write to {tmp}/run, which is mounted read-only"),
        ("/:/:ro,{tmp}:{tmp}:rw", None),
    ],
)
def test_mounts_that_do_not_give_what_the_job_needs(tmp_path, mounts, warning):
    (tmp_path / "image.sqsh").touch()
    cluster = {"gpu": "none", "gpus-per-node": 1, "python": "/usr/bin/python3"}
    (tmp_path / "site.yaml").write_text(json.dumps(cluster))
    words = ["--cluster", str(tmp_path / "site.yaml"), "--run-folder", str(tmp_path / "run"), *FLAGS]
    words += ["--container-image", str(tmp_path / "image.sqsh"), "--data-cache-path", str(tmp_path / "cache")]
    done = submit(*words, "--container-mounts", mounts.format(tmp=tmp_path))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "WARNING: " in line and "close to" not in line]
    assert any(warning.format(tmp=tmp_path) in line for line in warnings) if warning else not warnings
    (tmp_path / "image.sqsh").unlink()
    assert "this machine has no image" in submit(*words, "--container-mounts", "/:/").stdout


def test_configs_must_be_mounted(tmp_path):
    """The job reads them, too."""
    config = tmp_path / "mine.yaml"
    config.write_text("lr-decay-style: cosine\n")
    words = ["--config", str(config), *FLAGS, "--container-image", "x"]
    run = tmp_path / "run"
    mounts = f"{ROOT}:{ROOT},{run}:{run}"
    assert f"will not have {config}" in submit(*words, "--container-mounts", mounts).stdout


def test_gpus_as_gres(tmp_path):
    settings = {"gpu": "hopper", "sbatch": {"gpus-per-node": False, "gres": "gpu:h100:8"}}
    (tmp_path / "site.yaml").write_text(json.dumps(settings))
    script = submit("--no-check", "--cluster", str(tmp_path / "site.yaml"), *FLAGS).stdout
    assert "#SBATCH --gres=gpu:h100:8\n" in script and "#SBATCH --gpus-per-node" not in script


def test_container_only_when_named():
    assert "CONTAINER_IMAGE=''" in submit("--no-check", *FLAGS).stdout
    assert "CONTAINER_IMAGE=x.sqsh" in submit("--no-check", "--container-image", "x.sqsh", *FLAGS).stdout


@pytest.mark.parametrize(
    ("words", "nodes", "cluster", "message"),
    [
        ([*FLAGS, "--tensor-model-parallel-size", "3"], 1, "cpu", "cannot be divided into"),
        ([*FLAGS, *HEADS4, "--tensor-model-parallel-size", "4"], 2, "cpu", "spans nodes of 2 GPUs"),
        ([*FLAGS, "--num-layrs", "3"], 1, "cpu", "did you mean --num-layers"),
        (TINY, 1, "cpu", "--save-interval is missing"),
        ([*BIG, "--micro-batch-size", "1"], 1, "h100", "a step takes 1"),
        ([*BIG, "--micro-batch-size", "2", "--use-distributed-optimizer"], 8, "h100", "of a GPU that has 80"),
        (
            [*BIG[:3], "use-distributed-optimizer=false", *BIG[3:], "--micro-batch-size", "1"],
            1,
            "h100",
            "optimizer: add --use-",
        ),
        (FLAGS, 0, "cpu", "--nodes 0 must be at least 1"),
        (["--time", "4h", *FLAGS], 1, "cpu", "--time 4h: write minutes"),
        (["--time", "5:30", *FLAGS], 1, "cpu", "--save-seconds 300 leaves no time to train in --time 5:30"),
        (FLAGS, 1, "missing", "is missing"),
        ([*FLAGS, "--lr-warmup-iters", "20"], 1, "cpu", "--lr-warmup-iters 20 must be below"),
        ([*FLAGS, "--load", "/no/such/folder"], 1, "cpu", "--load /no/such/folder holds no checkpoint"),
        (
            [*FLAGS, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/no/such/folder"],
            1,
            "cpu",
            "--tokenizer-model /no/such/folder does not exist",
        ),
    ],
)
def test_mistakes_are_seen_before_queueing(words, nodes, cluster, message):
    done = submit(*words, nodes=nodes, cluster=cluster)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert done.stderr.startswith("submit.py: error:") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["--wandb-api-key", "s3cret"], {}),
        (["--wandb-api-key=s3cret"], {}),
        (["--data-path", "0.5", "s3://me:s3cret@bucket/data"], {}),
        (["--sbatch", "export=HF_TOKEN=hf_s3cretabcdef"], {}),
        ([], {"WANDB_API_KEY": "s3cret"}),
    ],
)
def test_secrets_are_refused_before_they_are_written(words, env, tmp_path):
    (tmp_path / "site.yaml").write_text(json.dumps({"gpu": "none", "env": env}))
    done = submit("--no-check", "--cluster", str(tmp_path / "site.yaml"), *words, *FLAGS)
    assert done.returncode == 2 and "holds a secret" in done.stderr and "s3cret" not in done.stdout + done.stderr


def test_hash_in_a_path_is_no_secret():
    done = submit("--no-check", "--tokenizer-model", f"/models/snapshots/{'0123456789abcdef' * 2}", *FLAGS)
    assert done.returncode == 0, done.stderr


def test_unknown_key_of_a_cluster(tmp_path):
    (tmp_path / "site.yaml").write_text("gpus: 8\n")
    done = submit("--cluster", str(tmp_path / "site.yaml"), *FLAGS)
    assert done.returncode == 2 and "unknown key gpus" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpus-per-node: eight", "gpus-per-node must be a whole number, not 'eight'"),
        ("gpu-memory-gib: .nan", "gpu-memory-gib nan must be above 0, and finite"),
        ("gpu-memory-gib: 80GB", "gpu-memory-gib must be a number, not '80GB'"),
        ("preflight: {min-tflop: 600}", "preflight: unknown setting min-tflop=600"),
        ("preflight: {min-tflops: fast}", "preflight: argument --min-tflops: invalid float value: 'fast'"),
        ("gpus-per-node: 0", "gpus-per-node 0 must be above 0"),
        ("gpus-per-node: true", "gpus-per-node must be a whole number, not True"),
        ("gpu: hoper", "gpu hoper must be one of ampere, hopper, blackwell, none"),
        ("python: [a, b]", "python must be the path of an interpreter, not ['a', 'b']"),
        ("env: {A B: 1}", "env: 'A B' is no name of a variable"),
        ("env: {A: [1, 2]}", "env: A: [1, 2] is not the text or number that is expected"),
        ("container: {image: [a]}", "container: image: ['a'] is not the text"),
        ("sbatch: {time: 60}", "sbatch: time cannot be set: use --time"),
        ("sbatch: {requeue: false}", "sbatch: requeue cannot be set: every job is submitted with it"),
        ("sbatch: {array: 0-3}", "sbatch: array cannot be set: every element would run the same run folder"),
        ("sbatch: {exclusiv: true}", "sbatch: exclusiv is no option of sbatch; did you mean exclusive?"),
        ('sbatch: {"x\\ny": 1}', "sbatch: 'x\\ny' holds a line break"),
        ('sbatch: {comment: "x\\ny"}', "sbatch: 'comment' holds a line break"),
        ('python: "/bin/python\\n"', "python holds a line break"),
        ('env: {A: "x\\ny"}', "env: 'A' holds a line break"),
        ("env: {REPO: /x}", "env: REPO is set by the batch script"),
        ("container: {mounts: '/a:/b'}", "has no effect without an image"),
        ("container: {image: x, mounts: 'a:/b'}", "'a:/b': write /SOURCE:/TARGET[:FLAGS],..."),
        ("{1: 2, x: 3}", "unknown key 1; known are"),
        ("- a", "must be a mapping of settings, not ['a']"),
        ("container: {mount: /data}", "container: unknown key mount; known are ['image', 'mounts']"),
        ("preflight: {cpu: true}", "preflight: argument --cpu: ignored explicit argument 'True'"),
        ("env: NCCL_DEBUG=INFO", "env must be a mapping, not 'NCCL_DEBUG=INFO'"),
        ("sbatch: [exclusive]", "sbatch must be a mapping"),
        ("launcher: mpirun", "launcher mpirun must be one of srun, torchrun"),
    ],
)
def test_wrong_value_of_a_cluster(line, said, tmp_path):
    (tmp_path / "site.yaml").write_text(f"{line}\n")
    done = submit("--cluster", str(tmp_path / "site.yaml"), *FLAGS)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sbatch", "time=1:00:00"], "--sbatch time cannot be set: use --time"),
        (["--sbatch", "a=0-3"], "--sbatch a cannot be set: every element would run the same run folder"),
        (["--job-name", "x\ny"], "--job-name holds a line break"),
        (["--partition", "x\r"], "--partition holds a line break"),
        (["--run-folder", "/nowhere/a\nb"], "holds a line break"),
        (["--run-folder", "/nowhere/a\\b"], "no backslash"),
        (["--container-image", "x\x1b"], "CONTAINER_IMAGE holds the character '\\x1b', which is no text"),
        (["--app-tag-run-name", "x\ny"], "'x\\ny', holds a line break"),
        (["--max-restarts", "-3"], "--max-restarts -3 must not be negative"),
        (["--time", "²"], "--time ²: write minutes"),
    ],
)
def test_wrong_flags_of_submit(flags, said):
    done = submit("--no-check", *FLAGS, *flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_settings_that_are_null_are_left_out(tmp_path):
    (tmp_path / "site.yaml").write_text("gpus-per-node:\ngpu:\nenv:\n")
    done = submit("--no-check", "--cluster", str(tmp_path / "site.yaml"), *FLAGS)
    assert done.returncode == 0 and "PROCS_PER_NODE=8" in done.stdout, done.stderr


SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*")]


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in SCRIPTS if path.is_file()])
def test_help(script):
    interpreter = [sys.executable] if script.endswith(".py") else ["bash"]
    done = subprocess.run([*interpreter, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) > 100 and not done.stderr


def test_shellcheck_is_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [
        *map(str, [*ROOT.glob("launch/*.sh"), *ROOT.glob("tools/*.sh")]),
        str(ROOT / "launch/slurm/train.sbatch"),
    ]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_site_names():
    """Cluster configs hold no partition, account or address."""
    for path in ROOT.glob("configs/cluster/*.yaml"):
        lines = [line.split("#")[0] for line in path.read_text().splitlines()]
        assert not [line for line in lines if any(word in line for word in ("partition", "account", "/"))]
