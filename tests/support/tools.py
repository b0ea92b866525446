"""The tools' command lines as a user runs them: in fresh processes, which have Megatron in memory already."""

import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from support.cli import end, like_a_fresh_interpreter
from support.worlds import print_to, spawn

ROOT = Path(__file__).parents[2]
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def _run(script: str, arguments: list[str], out: str, err: str, text: str) -> int:
    """Exit code of the script, told as the interpreter tells it."""
    for name in OF_TORCHRUN:
        del os.environ[name]
    print_to(out, 1)
    print_to(err, 2)
    sys.stdin = open(text)  # noqa: SIM115  (until the process ends)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    like_a_fresh_interpreter()
    logging.root.handlers.clear()  # what importing pretrain_yoco.py has set
    logging.root.setLevel(logging.WARNING)
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as done:
        if not isinstance(done.code, str):
            return done.code or 0
        print(done.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        end()


def start(tool: str, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """tools/TOOL.py, run to its end, with `text` as its standard input."""
    command = [str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err, given = (Path(folder, name) for name in ("out", "err", "in"))
        given.write_text(text)
        (code,) = spawn(_run, 1, (command[0], command[1:], *map(str, (out, err, given))), env={"HF_HUB_OFFLINE": "1"})
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def run(tool: str, *arguments: object, fails: bool = False) -> str:
    """Standard output of tools/TOOL.py, or its standard error if it is to fail as argparse does."""
    done = start(tool, *arguments)
    assert done.returncode == (2 if fails else 0), done.stderr
    return done.stderr if fails else done.stdout
