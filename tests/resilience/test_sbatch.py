"""Options of sbatch: SLURM's own list, what a job that requeues itself cannot have, and text of one line."""

import re
import shutil
import subprocess

import pytest

from yoco_megatron.resilience import sbatch


def test_long_and_short_names_are_one():
    assert sbatch.checked("--sbatch", "p", "big") == ("partition", "big")
    assert sbatch.checked("--sbatch", "--exclusive", True) == ("exclusive", True)
    assert sbatch.checked("sbatch:", "mem", 0) == ("mem", 0)
    known = sbatch.WITH_VALUE | sbatch.ALONE | sbatch.EITHER
    assert set(sbatch.SHORT.values()) <= known | sbatch.REFUSED.keys()
    assert len(known) == len(sbatch.WITH_VALUE) + len(sbatch.ALONE) + len(sbatch.EITHER)


@pytest.mark.parametrize("name", ["array", "a", "--array", "het-group", "no-requeue", "wrap", "ntasks-per-node", "W"])
def test_what_contradicts_the_script_is_refused(name):
    with pytest.raises(ValueError, match=f"--sbatch {name} cannot be set: "):
        sbatch.checked("--sbatch", name, "1")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mem-per-gpuu", "4G", r"mem-per-gpuu is no option of sbatch; did you mean mem-per-gpu\?"),
        ("arra", "0-3", "arra is no option"),  # sbatch would take it for array
        ("Partition", "x", "did you mean partition"),
        ("job_name", "x", "did you mean job-name"),
        ("", "x", "is no option"),
        ("partition", True, "partition needs a value"),
        ("partition", "", "partition needs a value"),
        ("hold", "1", "hold takes no value, but has '1'"),
        ("comment", "x\ny", "comment holds a line break"),
        ("comment", "x\u2028y", "holds the character"),
        ("comment", "x\udcff", "holds the character"),
        ("com\nment", "x", "holds a line break"),
    ],
)
def test_what_sbatch_would_not_take_is_refused(name, value, said):
    with pytest.raises(ValueError, match=said):
        sbatch.checked("--sbatch", name, value)


def test_a_sites_plugins_are_known(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text(
        '#!/bin/sh\necho "  -x, --exclude=hosts   text --no-option"\necho "      --tmpfs=[size]   a plugin\'s"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sbatch.checked("--sbatch", "tmpfs", "1G") == ("tmpfs", "1G")
    with pytest.raises(ValueError, match="no-option is no option"):
        sbatch.checked("--sbatch", "no-option", True)


def test_variables_that_win_are_refused():
    sbatch.check_environment({"SBATCH_ACCOUNT": "x", "SLURM_JOB_ID": "1"})
    with pytest.raises(ValueError, match="SBATCH_NO_REQUEUE is set, and wins over the batch script: unset it"):
        sbatch.check_environment({"SBATCH_NO_REQUEUE": "1"})


def test_the_list_is_slurms():
    """Every option of the manual that is installed here, and no other of its time."""
    page = shutil.which("man") and subprocess.run(["man", "sbatch"], capture_output=True, text=True).stdout
    found = set(re.findall(r"^ {7}(?:-\w, )?--([a-z][a-z0-9-]+)", page or "", re.MULTILINE))
    if not found:
        pytest.skip("no manual of sbatch here")
    assert len(found) > 80
    assert found <= sbatch.WITH_VALUE | sbatch.ALONE | sbatch.EITHER | sbatch.REFUSED.keys()
