"""The wheel that `pip install .` makes holds all that runs need: not only an editable install works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "yoco_megatron"

USES = """
import sys
sys.path.insert(0, sys.argv[1])
import json
from pathlib import Path
import torch
import yoco_megatron.hf
from yoco_megatron.ops.gated_retention.tuning import config_for
print(json.dumps({
    "tuned": [config_for(kernel, 128, torch.bfloat16).num_warps for kernel in ("forward", "backward", "segment")],
    "copied with a model": sorted(p.name for p in Path(yoco_megatron.hf.__file__).parent.glob("*_yoco.py")),
    "files": [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "yoco_megatron"],
}))
"""


def _python(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-I", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but our wheel; built from a copy, as setuptools writes beside the source."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / PACKAGE, place / "source" / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, place / "source")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    _python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", "./source", cwd=place)
    (wheel,) = place.glob("*.whl")
    _python(*pip, "install", "--no-deps", "--no-index", "--target", "empty", "--no-compile", wheel, cwd=place)
    return place / "empty"


def test_every_file_of_the_package_is_in_the_wheel(installed):
    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    assert files(installed / PACKAGE) == files(ROOT / PACKAGE)
    assert {"py.typed", "ops/gated_retention/tuning.json"} <= files(installed / PACKAGE)


def test_the_installed_package_reads_its_own_files(installed, tmp_path):
    used = json.loads(_python("-c", USES, installed, cwd=tmp_path))
    assert all(warps > 0 for warps in used["tuned"])
    assert used["copied with a model"] == sorted(p.name for p in (ROOT / PACKAGE / "hf").glob("*_yoco.py"))
    assert used["files"], "nothing was loaded"
    assert all(Path(file).is_relative_to(installed) for file in used["files"]), used["files"]
