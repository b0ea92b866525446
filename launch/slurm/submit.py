"""Submit a pretraining run to SLURM: check it on this machine, write the batch script, and hand it to sbatch.

    python launch/slurm/submit.py --nodes 64 --time 04:00:00 --cluster configs/cluster/h100.yaml --run-folder RUN \\
        --config configs/model/yoco_3b.yaml configs/recipe/3b_1t.yaml --data-path DATA_text_document ...

Every flag that is not listed here goes to pretrain_yoco.py. The job saves before its time limit, requeues itself and
resumes; docs/resilience.md says what happens when. Submitting the same run folder again continues the run.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from yoco_megatron.config.yaml_files import LIMIT, parse_yaml
from yoco_megatron.resilience import preflight, run_folder, sbatch, secrets
from yoco_megatron.resilience.launch_environment import launch_environment
from yoco_megatron.utils.small_files import BadFile, read_text

CLUSTER_KEYS = {
    "gpu",
    "gpus-per-node",
    "gpu-memory-gib",
    "launcher",
    "python",
    "sbatch",
    "container",
    "preflight",
    "env",
}
GPUS = ("ampere", "hopper", "blackwell", "none")
# Settings that are mappings, and what their values may be.
SCALAR = str | int | float
MAPPINGS = {"sbatch": SCALAR | None, "container": str, "preflight": SCALAR, "env": SCALAR}
# Variables of launch/slurm/train.sbatch.
SETTINGS = {
    *("RUN_FOLDER", "TRAIN_ARGS", "LAUNCHER", "PROCS_PER_NODE", "REPO", "PYTHON", "MAX_RESTARTS", "PREFLIGHT_ARGS"),
    *("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "MASTER_ADDR", "MASTER_PORT", "YOCO_ATTEMPT", "LOGS"),
}
CONTAINER_KEYS = {"image", "mounts"}
LAUNCHERS = ("srun", "torchrun")
# Of a GPU's memory: a plan above it does not fit, as formulas are within 3% of what was measured.
CERTAIN = 1.1


def parser() -> argparse.ArgumentParser:
    """Options of this script."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--run-folder", required=True, help="everything of the run goes there; all nodes must see it")
    p.add_argument("--cluster", default=str(ROOT / "configs/cluster/h100.yaml"), help="site settings, YAML")
    p.add_argument("--nodes", type=int, required=True)
    p.add_argument("--time", required=True, help="time limit of one attempt, as sbatch takes it")
    p.add_argument("--job-name", help="default: the name of the run folder")
    p.add_argument("--partition")
    p.add_argument("--account")
    p.add_argument("--qos")
    p.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other option of sbatch")
    p.add_argument("--container-image", help="pyxis; the cluster config can name one, too")
    p.add_argument("--container-mounts", help="default: this checkout and the run folder")
    p.add_argument("--launcher", choices=LAUNCHERS, help="a task per process, or torchrun on each node")
    p.add_argument("--save-seconds", type=int, default=300, help="ask to save so long before the time limit")
    p.add_argument("--max-restarts", type=int, default=3, help="attempts without a new trained step before giving up")
    p.add_argument("--no-preflight", action="store_true", help="do not test the nodes before training")
    p.add_argument("--no-check", action="store_true", help="this machine lacks torch or the data: check nothing")
    p.add_argument("--dry-run", action="store_true", help="show plan and script, submit nothing, write nothing")
    return p


def load_cluster(path: str) -> dict[str, Any]:
    """Site settings; what is null is left out. Raises ValueError for a file, key or value that is wrong."""
    try:
        text = read_text(Path(path), LIMIT)
    except (BadFile, OSError) as error:
        raise ValueError(f"--cluster {error}") from None
    try:
        return _checked(parse_yaml(text) or {})
    except ValueError as error:
        raise ValueError(f"--cluster {path}: {error}") from None


def _checked(cluster: Any) -> dict[str, Any]:
    if not isinstance(cluster, dict):
        raise ValueError(f"must be a mapping of settings, not {cluster!r:.60}")
    if unknown := sorted(map(str, cluster.keys() - CLUSTER_KEYS)):
        raise ValueError(f"unknown key {unknown[0]}; known are {sorted(CLUSTER_KEYS)}")
    cluster = {key: value for key, value in cluster.items() if value is not None}
    for key, kind, kinds in (("gpus-per-node", int, "a whole number"), ("gpu-memory-gib", int | float, "a number")):
        value = cluster.get(key, 1)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{key} must be {kinds}, not {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{key} {value} must be above 0, and finite")
    for key, choices in (("gpu", GPUS), ("launcher", LAUNCHERS)):
        if cluster.get(key, choices[0]) not in choices:
            raise ValueError(f"{key} {cluster[key]} must be one of {', '.join(choices)}")
    if not isinstance(cluster.get("python", ""), str):
        raise ValueError(f"python must be the path of an interpreter, not {cluster['python']!r}")
    sbatch.check_text("python", cluster.get("python", ""))
    for key, allowed in MAPPINGS.items():
        _check_mapping(key, cluster.get(key, {}), allowed)
    given = [(name, value) for name, value in cluster.get("sbatch", {}).items() if value is not None]
    cluster["sbatch"] = dict(sbatch.checked("sbatch:", name, value) for name, value in given)
    if unknown := sorted(cluster.get("container", {}).keys() - CONTAINER_KEYS):
        raise ValueError(f"container: unknown key {unknown[0]}; known are {sorted(CONTAINER_KEYS)}")
    for name in cluster.get("env", {}):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"env: {name!r} is no name of a variable")
        if name in SETTINGS or name.startswith("SLURM_"):
            raise ValueError(f"env: {name} is set by the batch script; remove it")
    try:
        _, surplus = preflight.parser(exit_on_error=False).parse_known_args(["RUN", *preflight_flags(cluster)])
    except argparse.ArgumentError as error:
        raise ValueError(f"preflight: {error}") from None
    if surplus:
        raise ValueError(
            f"preflight: unknown setting {surplus[0].removeprefix('--')}; "
            "python -m yoco_megatron.resilience.preflight --help lists them"
        )
    return cluster


def _check_mapping(key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, not {value!r}")
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, kind):
            raise ValueError(
                f"{key}: {name}: {item!r} is not the text or number that is expected; quote it if it is text"
            )
        sbatch.check_text(f"{key}: {name!a}", f"{name}{item}")


def preflight_flags(cluster: dict[str, Any]) -> list[str]:
    """Flags of yoco_megatron.resilience.preflight: the cluster's settings, and whether it has GPUs."""
    cpu = ["--cpu"] if cluster.get("gpu") == "none" else []
    return [*cpu, *(f"--{name}={value}" for name, value in cluster.get("preflight", {}).items())]


def seconds_of(limit: str) -> int:
    """Of a time limit as sbatch takes it. Raises ValueError."""
    days, _, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isascii() and part.isdigit() for part in [days or "0", *parts]) or len(parts) > 3:
        raise ValueError(f"--time {limit}: write minutes, minutes:seconds or [days-]hours:minutes:seconds")
    numbers = list(map(int, parts))
    if not days and len(parts) < 3:
        numbers.insert(0, 0)  # no hours
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Mount(NamedTuple):
    """A folder of the nodes, and where the container will have it."""

    source: Path
    target: Path
    flags: str = ""


def check_container(options: argparse.Namespace) -> list[Mount] | None:
    """What the container will have; None: there is no container.

    Raises:
        ValueError: mounts without an image, or that pyxis would not take.
    """
    mounts = options.container_mounts
    if not options.container_image:
        if mounts:
            raise ValueError("--container-mounts (container: mounts) has no effect without an image: name it, too")
        return None
    if not mounts:
        for path in (str(ROOT), options.run_folder):
            if set(path) & set(",:"):
                raise ValueError(f"{path} holds a comma or a colon, which mounts cannot: name other folders")
        return [Mount(folder, folder) for folder in (ROOT, Path(options.run_folder))]
    for mount in mounts.split(","):
        if not re.fullmatch(r"/[^:]*:/[^:]*(:[a-z+-]+)?", mount):
            raise ValueError(f"--container-mounts (container: mounts) {mount!r}: write /SOURCE:/TARGET[:FLAGS],...")
    parts = [mount.split(":") for mount in mounts.split(",")]
    return [Mount(Path(source), Path(target), "".join(flags)) for source, target, *flags in parts]


def container_warnings(
    options: argparse.Namespace,
    cluster: dict[str, Any],
    train_args: list[str],
    args: argparse.Namespace,
    mounts: list[Mount],
) -> list[str]:
    """What is likely to be missing in the job's container, seen from outside."""
    lines = [
        f"the container will not have {path}: mount it (--container-mounts), or name what is inside"
        for path in not_mounted(args, train_args, cluster, options.run_folder, mounts)
    ]
    new = Path(options.run_folder)  # made at submission
    sources = [mount.source for mount in mounts if mount.source != new and not mount.source.exists()]
    lines += [f"this machine has no {source}, which is to be mounted: the nodes must" for source in sources]
    image = options.container_image
    if image.startswith("/") and not Path(image).exists():
        lines.append(f"this machine has no image {image}: the nodes must")
    inside = [mount for mount in mounts if new.is_relative_to(mount.target)]
    if inside and "ro" in re.split(r"[+,]", max(inside, key=lambda mount: len(mount.target.parts)).flags):
        lines.append(f"the container cannot write to {new}, which is mounted read-only (ro)")
    return lines


def not_mounted(
    args: argparse.Namespace, train_args: list[str], cluster: dict[str, Any], run: str, mounts: list[Mount]
) -> list[str]:
    """What the job reads or writes and its container will not have; of Pythons, one of this machine alone."""
    data = [word for words in (args.data_path, args.train_data_path, args.valid_data_path) for word in words or ()]
    files = [run, str(ROOT), args.tokenizer_model, args.load, args.save, args.data_cache_path, args.data_args_path]
    files += data if "python" in cluster else [*data, sys.executable]
    # Configs, and whatever else is named in full.
    files += [
        word for arg in train_args for word in arg.split("=", 1) if Path(word).is_absolute() or Path(word).is_file()
    ]
    paths = {Path(file).absolute() for file in files if file and "/" in file and "://" not in file}
    missing = {path for path in paths if not any(path.is_relative_to(mount.target) for mount in mounts)}
    return sorted(str(path) for path in missing if missing.isdisjoint(path.parents))


def check(
    options: argparse.Namespace, cluster: dict[str, Any], train_args: list[str], mounts: list[Mount] | None
) -> tuple[str, dict[str, str]]:
    """The plan as text, and the environment that it asks for.

    Args:
        mounts: of `check_container`.
    Raises:
        ValueError: what would make the job fail at its start.
    """
    from yoco_megatron.startup.prepare import prepare

    prepare()
    from yoco_megatron.costs.memory import GIB, gpu_memory
    from yoco_megatron.costs.shape import ModelShape, parameter_count
    from yoco_megatron.planning.flags import uncounted
    from yoco_megatron.startup.arguments import parse_for_job
    from yoco_megatron.utils.small_files import BadFile

    per_node = cluster.get("gpus-per-node", 8)
    processes = options.nodes * per_node
    args, stages = parse_for_job(train_args, processes)
    shape = ModelShape.from_args(args)
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if tp > per_node:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} spans nodes of {per_node} GPUs: use at most {per_node}, and "
            "--pipeline-model-parallel-size for the rest"
        )
    parts, unread = stages.parts() if stages else None, []
    try:
        memory = gpu_memory(args, parts)
    except BadFile as error:  # the job's nodes may have it
        unread.append(f"WARNING: {error}: the teacher is not counted in this memory")
        memory = gpu_memory(argparse.Namespace(**vars(args) | {"teacher": None}), parts)
    data = processes // (tp * pp * cp)
    lines = [
        f"{options.nodes} nodes x {per_node} = {processes} processes: tensor {tp} x pipeline {pp} x context {cp} x "
        f"data {data}",
        f"{sum(parameter_count(shape).values()):,} parameters, --seq-length {args.seq_length}, --global-batch-size "
        f"{args.global_batch_size}, --train-iters {args.train_iters}"
        if shape.padded_vocab_size
        else f"--seq-length {args.seq_length}",
        f"memory per GPU: {memory.states / GIB:.1f} GiB of states, about {memory.activations / GIB:.1f} GiB "
        "of activations",
        *unread,
    ]
    limit = cluster.get("gpu-memory-gib")
    changed = uncounted(args)
    lines += [f"WARNING: {flag} is not counted: this memory is that without it" for flag in changed]
    if limit and not changed and (memory.states > limit * GIB or memory.total > CERTAIN * limit * GIB):
        raise ValueError(
            f"a step takes {memory.total / GIB:.1f} GiB of a GPU that has {limit} (gpu-memory-gib), "
            f"{memory.states / GIB:.1f} of them for weights, gradients and optimizer: "
            f"{'' if args.use_distributed_optimizer else 'add --use-distributed-optimizer, '}raise "
            "--tensor-model-parallel-size or --pipeline-model-parallel-size, lower --micro-batch-size, or add "
            "--recompute-granularity; tools/plan.py search finds what fits"
        )
    elif limit and memory.total > 0.9 * limit * GIB:
        lines.append(f"WARNING: that is close to or above {limit} GiB: see --recompute-granularity, --micro-batch-size")
    if mounts is not None:
        warnings = container_warnings(options, cluster, train_args, args, mounts)
        lines += [f"WARNING: {warning}" for warning in warnings]
    if args.save_interval is None:
        raise ValueError("--save-interval is missing: a node failure would lose everything since the start")
    return "\n".join(lines), launch_environment(cluster.get("gpu", "hopper"), args, options.run_folder)


def render(options: argparse.Namespace, cluster: dict[str, Any], environment: dict[str, str]) -> str:
    """The batch script: header, settings, then launch/slurm/train.sbatch as it is."""
    run, per_node = Path(options.run_folder), cluster.get("gpus-per-node", 8)
    launcher = options.launcher or cluster.get("launcher", "srun")
    header = {
        "job-name": options.job_name or run.name,
        "nodes": options.nodes,
        "ntasks-per-node": per_node if launcher == "srun" else 1,
        "time": options.time,
        "signal": f"B:USR1@{options.save_seconds}",
        "output": f"{str(run).replace('%', '%%')}/logs/job-%j.log",
        "open-mode": "append",
        "requeue": True,
    }
    site = {} if cluster.get("gpu", "hopper") == "none" else {"gpus-per-node": per_node}
    site |= cluster.get("sbatch", {})
    header |= {name: value for name, value in site.items() if value is not False}
    header |= {name: value for name in ("partition", "account", "qos") if (value := getattr(options, name))}
    header |= options.sbatch
    directives = [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in header.items()
    ]
    settings = {
        "RUN_FOLDER": str(run),
        "TRAIN_ARGS": str(run / "train_args.txt"),
        "LAUNCHER": launcher,
        "PROCS_PER_NODE": per_node,
        "REPO": str(ROOT),
        "PYTHON": cluster.get("python") or sys.executable,
        "MAX_RESTARTS": options.max_restarts,
        "PREFLIGHT_ARGS": "skip" if options.no_preflight else " ".join(preflight_flags(cluster)),
        "CONTAINER_IMAGE": options.container_image,
        "CONTAINER_MOUNTS": options.container_mounts,
    }
    exports = environment | {name: str(value) for name, value in cluster.get("env", {}).items()}
    for name, value in ({f"--{name}": value for name, value in header.items()} | settings | exports).items():
        sbatch.check_text(name, value)
    lines = ["#!/usr/bin/env bash", *directives, ""]
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    body = (ROOT / "launch/slurm/train.sbatch").read_text().split("\n", 1)[1]
    return "\n".join(lines) + "\n\n" + body


def main(argv: list[str]) -> int:
    options, train_args = parser().parse_known_args(argv)
    options.run_folder = str(Path(options.run_folder).resolve())
    train_args = [*train_args, "--run-folder", options.run_folder]
    cluster = load_cluster(options.cluster)
    if options.nodes < 1:
        raise ValueError(f"--nodes {options.nodes} must be at least 1")
    items = [item.partition("=") for item in options.sbatch]
    options.sbatch = dict(sbatch.checked("--sbatch", name, value if equals else True) for name, equals, value in items)
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts {options.max_restarts} must not be negative")
    early = 60  # SLURM's signal may come so many seconds before its time
    if options.save_seconds < 1 or seconds_of(options.time) < options.save_seconds + early:
        raise ValueError(
            f"--save-seconds {options.save_seconds} leaves no time to train in --time {options.time}: it must be at "
            "least 1, and a minute or more below --time"
        )
    settings = {f"--{name}": value for name, value in vars(options).items() if name != "sbatch"}
    settings |= options.sbatch | cluster.get("sbatch", {}) | cluster.get("env", {}) | cluster.get("container", {})
    secrets.refuse(train_args, settings)
    for word in train_args:  # a line each of a file
        sbatch.check_text(f"a flag of pretrain_yoco.py, {word[:40]!a},", word.replace("\t", " "))
    if "\\" in options.run_folder:
        raise ValueError(f"--run-folder {options.run_folder}: SLURM takes no backslash in the names of logs")
    sbatch.check_environment(dict(os.environ))
    options.container_image = options.container_image or cluster.get("container", {}).get("image", "")
    options.container_mounts = options.container_mounts or cluster.get("container", {}).get("mounts", "")
    mounts = check_container(options)
    if not options.dry_run and shutil.which("sbatch") is None:
        raise ValueError("no sbatch on this machine: submit where SLURM is, or add --dry-run to see the script")
    text, environment = ("not checked", {}) if options.no_check else check(options, cluster, train_args, mounts)
    script = render(options, cluster, environment)
    print(text)
    if options.dry_run:
        print(script)
        return 0
    run = Path(options.run_folder)
    # SLURM fails a job whose log folder is missing, without a word.
    for folder in (run / "logs", run / "triggers"):
        folder.mkdir(parents=True, exist_ok=True)
    (run / "train_args.txt").write_text("".join(word + "\n" for word in train_args))
    path = run / "train.sbatch"
    path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refuses {path}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER
    (run / run_folder.SUBMITTED).write_text(f"{job}\n")
    print(f"submitted job {job}: {path}\nwatch it: python launch/slurm/status.py {run}")
    return 0


def run(argv: list[str]) -> int:
    """`main`, with mistakes as one line. Returns the exit code."""
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        print(f"submit.py: error: {secrets.redact(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
