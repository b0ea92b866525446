"""Documentation that a command line would contradict is a defect: flags, files and make targets named there exist."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from yoco_megatron.startup.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ROOT / "benchmarks/NOTES.md"]
# Flags of other programs in our examples.
OTHERS = {"--logdir", "--nproc-per-node", "--no-build-isolation", "--no-deps", "--help", "--signal"}
OTHERS |= {"--model", "--tasks", "--include_path", "--model_args", "--trust-remote-code", "--kv-sharing-fast-prefill"}
OTHERS |= {"--served-model-name", "--gpus", "--ipc", "--ulimit", "--rm", "--gres", "--gpus-per-node"}
OTHERS |= {"--container-save", "--rw", "--dtype", "--extra-index-url"}


def own_flags() -> set[str]:
    """Every flag of pretrain_yoco.py, and those that a tool, a launcher or a benchmark defines."""
    flags = set(build_parser()._option_string_actions)
    folders = ("tools", "launch/slurm", "plugins/*", "benchmarks")
    for tool in [tool for folder in folders for tool in ROOT.glob(f"{folder}/*.py")]:
        flags |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', tool.read_text()))
    for script in ROOT.glob("launch/*.sh"):
        flags |= set(re.findall(r"^ +(--[a-z][a-z0-9-]+)\)", script.read_text(), re.MULTILINE))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]+)", page.read_text()))
    assert named - own_flags() - OTHERS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"(?:configs|tools|docs|tests|launch|yoco_megatron|benchmarks)/[\w./-]*\w(?:\.\w+)?", text))
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    missing = [name for name in named if not (ROOT / name).exists() and "SIZE" not in name and "NAME" not in name]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_lost_in_the_site(page: Path) -> None:
    """<S, R> would be a tag, and a list right behind a table one of its rows."""
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"</?([A-Za-z]\w*)[ ,>]", text)) <= {"sub", "sup", "code"}
    assert re.findall(r"^ *\|.*\n *[^|\s].*", text, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets


def test_each_fault_has_the_test_that_shows_it() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/resilience.md").read_text()))
    defined = {
        name for file in ROOT.glob("tests/**/*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named and named <= defined


def test_parity_list_is_the_tested_one() -> None:
    from parallel.test_parity import MESHES, UNIT_MESHES

    listed = re.findall(r"^\| ([^|]+) \| (?:un)?tied \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert listed == [*MESHES, *UNIT_MESHES]


def test_every_page_is_in_the_sites_reading_order() -> None:
    """What is missing there, and links and anchors that lead nowhere, are errors of `mkdocs build`."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        home = (Path(folder) / "index.html").read_text()
        for page in Path(folder).rglob("*.html"):  # mkdocs leaves the links of HTML in a page as they are
            for image in re.findall(r'<img[^>]* src="(?!https?:|data:)([^"]+)"', page.read_text()):
                assert (page.parent / image).exists(), f"{page}: {image}"
    for page in sorted(ROOT.glob("docs/*.md")):
        assert f'href="{page.stem}/"' in home, page
