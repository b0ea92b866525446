"""The doctor tells what is installed without importing it, and recognises what is harmful."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from yoco_megatron import doctor as module
from yoco_megatron.doctor import PACKAGES, as_text, check_apex, check_package, check_transformer_engine
from yoco_megatron.runtime.cpu import GPU_ONLY

ROOT = Path(__file__).parents[2]


def install(site: Path, distribution: str, version: str, modules: dict[str, str]) -> None:
    """A distribution as pip would leave it in `site`: metadata and the files of its modules."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name, content in modules.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)


def doctor(*arguments: str, site: Path | None = None, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, [ROOT, site])))}
    command = [sys.executable, *python, str(ROOT / "tools" / "doctor.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU runtime hides packages that need a GPU from Megatron; the doctor runs without it."""
    for name in GPU_ONLY:
        monkeypatch.delitem(sys.modules, name, raising=False)


POISON = 'raise RuntimeError("the doctor must not import this")'
PYPI_APEX = {"apex/__init__.py": POISON, "apex/lib/__init__.py": POISON}
NVIDIA_APEX = {f"apex/{name}__init__.py": POISON for name in ("", "optimizers/", "contrib/")}


@pytest.mark.parametrize("found_elsewhere", [False, True])
def test_apex_of_pypi_is_not_nvidia_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found_elsewhere: bool
) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", {} if found_elsewhere else PYPI_APEX)
    monkeypatch.syspath_prepend(tmp_path)
    component = check_apex()
    assert (component.state, component.version) == ("wrong", "0.9.10.dev0")
    assert "another project" in component.note
    assert "pip uninstall apex" in component.fix


def test_nvidia_apex_needs_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "apex", "0.1", NVIDIA_APEX)
    monkeypatch.syspath_prepend(tmp_path)
    assert check_apex().state == "wrong"
    assert "amp_C" in check_apex().note
    (tmp_path / "amp_C.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    assert check_apex().state == "ok"


def test_old_resiliency_extension_is_harmful_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = next(package for package in PACKAGES if package.name == "nvidia-resiliency-ext")
    for version, state in (("0.4.1", "wrong"), ("0.5.9", "wrong"), ("0.6.0", "ok"), ("0.10.0", "ok")):
        site = tmp_path / version
        install(site, "nvidia-resiliency-ext", version, {"nvidia_resiliency_ext/__init__.py": POISON})
        with monkeypatch.context() as context:
            context.syspath_prepend(site)
            component = check_package(package)
        assert (component.version, component.state) == (version, state)
        assert ("import megatron.core" in component.note) == (state == "wrong")


def test_absent_packages_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version_of", lambda distribution: None)
    monkeypatch.setattr(module, "package_dir", lambda name: None)
    absent = [check_apex(), check_transformer_engine("12.8"), *map(check_package, PACKAGES)]
    assert {component.state for component in absent} == {"missing"}
    assert all(component.note and component.fix for component in absent)
    assert "core_cu12" in absent[1].fix
    assert absent[0].fix in as_text(absent, [])


def test_transformer_engine_needs_its_torch_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "transformer-engine", "2.20.2", {"transformer_engine/__init__.py": POISON})
    monkeypatch.syspath_prepend(tmp_path)
    assert check_transformer_engine("13.0").state == "wrong"
    library = tmp_path / "transformer_engine" / "wheel_lib" / "transformer_engine_torch.cpython-312.so"
    library.parent.mkdir()
    library.touch()
    assert check_transformer_engine("13.0").state == "ok"


def test_whole_machine_as_json_with_a_harmful_package(tmp_path: Path) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", PYPI_APEX)
    install(tmp_path, "nvidia-resiliency-ext", "0.4.1", {"nvidia_resiliency_ext/__init__.py": POISON})
    done = doctor("--json", site=tmp_path)
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    components = {component["name"]: component for component in content["installed"]}
    wrong = {name for name, component in components.items() if component["state"] == "wrong"}
    assert {"NVIDIA Apex", "nvidia-resiliency-ext"} <= wrong
    assert content["healthy"] is False
    assert components["megatron-core"]["version"] == importlib.metadata.version("megatron-core")
    uses = {choice["part"]: choice for choice in content["uses"]}
    assert {"linear layers, norms", "attention", "gated retention", "optimizer"} <= uses.keys()
    assert all(choice["uses"] and choice["why"] for choice in uses.values())
    assert "Apex" not in uses["optimizer"]["uses"]
    assert uses["gated retention"]["uses"] != "nothing", uses["gated retention"]["why"]


def test_table_of_this_machine() -> None:
    done = doctor()
    assert done.returncode in (0, 1), done.stderr
    assert "TRAINING USES\n  device " in done.stdout
    assert importlib.metadata.version("torch") in done.stdout
    assert "http" not in done.stdout


def test_without_torch_and_megatron_it_says_what_to_install() -> None:
    """Python without site-packages: nothing at all is installed."""
    done = doctor(python=("-S",))
    assert done.returncode == 1, done.stderr
    assert 'pip install "torch==2.11.*"' in done.stdout
    assert 'pip install "megatron-core==0.19.*"' in done.stdout
    assert "torch does not import" in done.stdout
