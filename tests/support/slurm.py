"""A real SLURM on this one machine: munged, slurmctld and a few slurmd on loopback, all state in one folder.

Debian's and Ubuntu's packages allow several slurmd per host. Root is needed, as slurmd needs it. Each slurmd has a host
name of its own, for Megatron tells nodes apart by it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil

from yoco_megatron.utils.ports import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ["slurm-wlm", "slurmd", "slurmctld", "slurm-client", "munge"]
os.environ["PATH"] += os.pathsep + "/usr/sbin"


def why_not() -> str | None:
    """Why no cluster can be started here; installs SLURM's packages if it may."""
    if os.geteuid() != 0:
        return "needs root: slurmd does"
    if not all(map(shutil.which, DAEMONS)):
        if not shutil.which("apt-get"):
            return "SLURM is not installed and there is no apt-get"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *command], capture_output=True, text=True, env=environment, timeout=300)
            if done.returncode:
                return f"apt-get {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}"
    return None


class Cluster:
    """Nodes n1, n2, ... that no two jobs share; partitions `batch` and, above it, `urgent`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._queue: dict[str, tuple[str, str]] = {}
        self._asked, self._asking = 0.0, threading.Lock()
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]

    def _configure(self) -> None:
        host, (controller, *ports) = socket.gethostname().split(".")[0], free_ports(len(self.nodes) + 1)
        f = self.folder
        for name in ("state", "spool", "munge", "log", "run"):
            (f / name).mkdir(parents=True)
        f.chmod(0o755)
        (f / "run").chmod(0o755)
        (f / "munge").chmod(0o700)
        (f / "munge/key").write_bytes(os.urandom(128))
        (f / "munge/key").chmod(0o400)
        lines = f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={f}/run/munge.sock,cred_expire=15
SlurmctldPort={controller}
SlurmctldPidFile={f}/run/slurmctld.pid
SlurmdPidFile={f}/run/slurmd-%n.pid
SlurmctldLogFile={f}/log/slurmctld.log
SlurmdLogFile={f}/log/slurmd-%n.log
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
""".splitlines()
        for name, port in zip(self.nodes, ports):
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 Sockets=1 CoresPerSocket=1 "
                "ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
            )
        lines.append("PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP")
        lines.append("PartitionName=urgent Nodes=ALL PriorityTier=2 State=UP")
        (f / "slurm.conf").write_text("\n".join(lines) + "\n")

    def __enter__(self) -> "Cluster":
        self._configure()
        f = self.folder
        munge = {"key-file": "munge/key", "socket": "run/munge.sock", "pid-file": "run/munged.pid"}
        munge |= {"log-file": "log/munged.log", "seed-file": "munge/seed"}
        try:
            self._call("munged", "--force", *(f"--{name}={f / path}" for name, path in munge.items()))
            self._call("slurmctld", "-i")
            for name in self.nodes:
                (f / "spool" / name).mkdir()
                self._call("unshare", "--uts", "sh", "-c", f"hostname {name} && exec slurmd -N {name}")
            self.wait(
                lambda: self("sinfo", "-h", "-N", "-p", "batch", "-o", "%t").split() == ["idle"] * len(self.nodes), 30
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all jobs, then every daemon that was started here."""
        subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True)
        with contextlib.suppress(AssertionError):
            self.wait(lambda: not self("squeue", "-h"), 20)
        pid_files = sorted(self.folder.glob("run/*.pid"), key=lambda path: path.name.startswith("munged"))
        pids = [int(path.read_text()) for path in pid_files]
        for number in (signal.SIGTERM, signal.SIGKILL):  # munged last
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                self.wait(lambda: not any(map(psutil.pid_exists, pids)), 5)

    def _call(self, *command: str) -> str:
        # Daemons keep the pipes of their parent open: nothing may wait for those to close.
        log = self.folder / "log" / "output"
        with log.open("a") as out:
            done = subprocess.run(command, env=self.env, stdout=out, stderr=out, timeout=60)
        assert done.returncode == 0, f"{command}: {log.read_text()}"
        return ""

    def __call__(self, *command: str) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def names(self, nodes: str) -> list[str]:
        """n[1-2] -> n1, n2."""
        return self("scontrol", "show", "hostnames", nodes).split()

    def queue(self) -> dict[str, tuple[str, str]]:
        """Job -> (state, its nodes); not older than a second, as many threads ask."""
        with self._asking:
            if time.monotonic() - self._asked > 1:
                lines = self("squeue", "-h", "-t", "all", "-o", "%i|%T|%N").splitlines()
                self._queue = {job: (state, nodes) for job, state, nodes in (line.split("|") for line in lines)}
                self._asked = time.monotonic()
            return self._queue

    @staticmethod
    def wait(condition, seconds: float, what: str = "") -> None:
        """Until `condition()` is true. Raises AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
            time.sleep(0.2)
