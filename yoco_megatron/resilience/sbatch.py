"""The options of SLURM's sbatch: which there are, and which a job cannot have that requeues itself.

`launch/slurm/submit.py` writes them into the head of a batch script, so that what it takes here must stay one line.
"""

import re
import subprocess
import unicodedata
from typing import Any

from yoco_megatron.utils.errors import nearest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of SLURM 22.05 to 25.05.
WITH_VALUE = _names("""
    account acctg-freq batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type
    mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist open-mode output
    partition prefer priority profile qos reservation segment sockets-per-node switches thread-spec
    threads-per-core time-min tmp tres-bind tres-per-task uid wait-all-nodes wckey
""")
ALONE = _names("""
    consolidate-segments contiguous hold ignore-pbs overcommit quiet reboot resv-ports spread-job
    spread-segments stepmgr use-min-nodes verbose
""")
EITHER = _names("exclusive get-user-env nice no-kill oom-kill-step oversubscribe power propagate x11")
SHORT = {
    **{"A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task"},
    **{"D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input"},
    **{"J": "job-name", "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes"},
    **{"n": "ntasks", "O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec"},
    **{"s": "oversubscribe", "t": "time", "V": "version", "v": "verbose", "W": "wait", "w": "nodelist", "x": "exclude"},
    **{"h": "help"},
}
_PROCESSES = "the processes follow from --nodes, gpus-per-node of the cluster settings, and --launcher"
_NO_JOB = "sbatch would do something else than queue this job; --dry-run shows it"
REFUSED = {
    "array": "every element would run the same run folder at once; submit each run by itself",
    **dict.fromkeys(("het-group", "hetjob"), "all nodes of a run are alike, and belong to one job"),
    "no-requeue": "the job requeues itself, before its time limit and after faults",
    "requeue": "every job is submitted with it",
    "signal": "use --save-seconds, which tells when the job is asked to save",
    "time": "use --time",
    "nodes": "use --nodes",
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"), _PROCESSES
    ),
    **dict.fromkeys(("test-only", "wrap", "help", "usage", "version"), _NO_JOB),
    "parsable": "submit.py asks for it, and prints the job",
    "wait": "submit.py ends when the job is queued; launch/slurm/status.py tells how it goes",
}
# Variables that would win over the script's own lines.
REFUSED_VARIABLES = {
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_NO_REQUEUE": "no-requeue",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_WAIT": "wait",
}


def check_text(where: str, value: Any) -> None:
    """Raise ValueError for text that a line of a shell script cannot hold: line breaks, other control characters, bytes
    that are no text."""
    bad = [letter for letter in str(value) if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")]
    if bad:
        kind = "a line break" if bad[0] in "\n\r" else f"the character {bad[0]!a}, which is no text"
        raise ValueError(f"{where} holds {kind}")


def check_environment(environment: dict[str, str]) -> None:
    """Raise ValueError for variables of sbatch that would change what the script asks for."""
    for variable in REFUSED_VARIABLES.keys() & environment.keys():
        why = REFUSED[REFUSED_VARIABLES[variable]]
        raise ValueError(f"{variable} is set, and wins over the batch script: unset it; {why}")


def checked(where: str, name: str, value: Any) -> tuple[str, Any]:
    """An option and its value (True: none), with the option's long name.

    Args:
        where: what gave them, for errors.
    Raises:
        ValueError: no option of sbatch, one that the job cannot have, a value too many or too few, or no text.
    """
    given = name
    check_text(where, name)
    check_text(f"{where} {name}", value)
    name = name.lstrip("-")
    name = SHORT.get(name, name)
    if name in REFUSED:
        raise ValueError(f"{where} {given} cannot be set: {REFUSED[name]}")
    if name in WITH_VALUE:
        if value is True or str(value) == "":
            raise ValueError(f"{where} {given} needs a value")
    elif name in ALONE:
        if value is not True:
            raise ValueError(f"{where} {given} takes no value, but has {value!r}")
    elif name not in EITHER and name not in _options_here():
        close = nearest(name, [*WITH_VALUE, *ALONE, *EITHER])
        raise ValueError(f"{where} {given} is no option of sbatch{close}")
    return name, value


def _options_here() -> set[str]:
    """Options that the sbatch of this machine knows: a site's plugins add some. Empty without sbatch."""
    try:
        done = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(re.findall(r"^ +(?:-\w, )?--([a-z][a-z0-9-]+)", done.stdout, re.MULTILINE))
