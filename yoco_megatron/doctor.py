"""What is installed, what training will therefore use, and what a missing component costs: `tools/doctor.py`.

Versions come from package metadata and presence from files. Only torch is imported: some packages are slow to import,
and some break others when imported.
"""

import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from yoco_megatron.utils.packages import package_dir, version_of

State = Literal["ok", "missing", "wrong"]
# Head width of YOCO-3B, for which the retention backends are queried.
HEAD_DIM = 128


@dataclass(frozen=True)
class Component:
    """A package or device. `note`: what is lost without it, or what is wrong; `fix`: how to install it."""

    name: str
    version: str | None
    state: State
    required: bool = False
    note: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Choice:
    """What one part of training uses on this machine, and why."""

    part: str
    uses: str
    why: str


@dataclass(frozen=True)
class Package:
    """A distribution that is checked by version alone. Below `minimum` it is wrong; `cost`: what is lost without it."""

    name: str
    distribution: str
    cost: str
    required: bool = False
    minimum: tuple[int, ...] = ()
    below: str = "too old"


PACKAGES = [
    Package("flash-linear-attention", "flash-linear-attention", "gated DeltaNet without its GPU kernels"),
    Package("transformers", "transformers", "no Hugging Face tokenizer or export", True, (5,)),
    Package("tokenizers", "tokenizers", "no tokenizer can be trained, data are not preprocessed", True),
    Package("safetensors", "safetensors", "no export to Hugging Face"),
    Package(
        "nvidia-resiliency-ext", "nvidia-resiliency-ext", "no ft_launcher, no --async-strategy nvrx", False, (0, 6),
        "harmful: before 0.6.0 its presence makes `import megatron.core` 0.19 crash",
    ),
    Package("psutil", "psutil", "checkpoints cannot be saved", True),
    Package("pyyaml", "pyyaml", "configs cannot be read", True),
    Package("tqdm", "tqdm", "the data tools do not start"),
    Package("tensorboard", "tensorboard", "no curves with --tensorboard-dir"),
    Package("wandb", "wandb", "no logging with --wandb-project"),
    Package("nltk", "nltk", "no sentence splitting"),
]  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_package(package: Package) -> Component:
    """The state of a component that is checked by version alone."""
    version = version_of(package.distribution)
    wanted = ".".join(map(str, package.minimum))
    fix = f'pip install "{package.distribution}>={wanted}"' if wanted else f"pip install {package.distribution}"
    if version is None:
        return Component(package.name, None, "missing", package.required, package.cost, fix)
    if _numbers(version) < package.minimum:
        return Component(package.name, version, "wrong", package.required, package.below, fix)
    return Component(package.name, version, "ok", package.required)


def check_megatron() -> Component:
    """megatron-core, of which only 0.19 is supported."""
    version, fix = version_of("megatron-core"), 'pip install "megatron-core==0.19.*"'
    if version is None:
        return Component("megatron-core", None, "missing", True, "it is the trainer: nothing runs without it", fix)
    if _numbers(version)[:2] != (0, 19):
        return Component("megatron-core", version, "wrong", True, "this project extends 0.19 and no other", fix)
    return Component("megatron-core", version, "ok", True)


def check_apex() -> Component:
    """NVIDIA Apex, as opposed to the unrelated project `apex` on PyPI."""
    version, folder = version_of("apex"), package_dir("apex")
    fix = "build it from source: github.com/NVIDIA/apex (never `pip install apex`)"
    cost = "not needed with Transformer Engine; without either, the optimizer is torch's, which is not fused"
    if version is None and folder is None:
        return Component("NVIDIA Apex", None, "missing", False, cost, fix)
    if folder is None or not (folder / "optimizers").is_dir() or not (folder / "contrib").is_dir():
        note = (
            "this is PyPI's `apex`, another project, not NVIDIA Apex; Megatron takes `import apex` as proof of fused "
            "norms that it does not have"
        )
        return Component("NVIDIA Apex", version, "wrong", False, note, f"pip uninstall apex; then {fix}")
    if importlib.util.find_spec("amp_C") is None:
        note = "built without its CUDA extensions (no amp_C): its optimizers cannot run"
        return Component("NVIDIA Apex", version, "wrong", False, note, fix)
    return Component("NVIDIA Apex", version, "ok")


def check_transformer_engine(cuda: str | None) -> Component:
    """Transformer Engine with its PyTorch half; `cuda` is torch's CUDA version, None for a CPU build."""
    version = version_of("transformer-engine") or version_of("transformer-engine-torch")
    core = f"core_cu{_numbers(cuda)[0]}" if cuda else "core_cu13"
    fix = f'pip install --no-build-isolation "transformer-engine[pytorch,{core}]" (needs nvcc)'
    folder = package_dir("transformer_engine")
    if folder is None:
        note = "no fused norm and linear layers, no FP8, slower attention; not needed without a GPU"
        return Component("Transformer Engine", None, "missing", False, note, fix)
    places = (folder, folder / "wheel_lib", folder.parent)
    if not any(path for place in places for path in place.glob("transformer_engine_torch*.so")):
        note = "without its PyTorch half (transformer_engine_torch), so that it cannot be imported"
        return Component("Transformer Engine", version, "wrong", False, note, fix)
    return Component("Transformer Engine", version or "?", "ok")


def import_torch() -> Any:
    """torch, or the exception that its import raises."""
    try:
        import torch
    except Exception as error:  # a missing library is an ImportError or an OSError
        return error
    return torch


def check_torch(torch: Any) -> list[Component]:
    """torch, its build, and the visible GPUs."""
    version = version_of("torch")
    if isinstance(torch, Exception):
        note = f"it does not import: {torch}" if version else "everything is built on it"
        state: State = "wrong" if version else "missing"
        return [Component("torch", version, state, True, note, 'pip install "torch==2.11.*"')]
    from yoco_megatron import runtime

    components = [Component("torch", torch.__version__, "ok", True)]
    components.append(_part_of_torch("CUDA", torch.version.cuda, "this torch is a CPU build"))
    count = torch.cuda.device_count() if runtime.has_gpu() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    components.append(_part_of_torch("GPU", gpus or None, "training runs on the CPU, for correctness only"))
    components.append(_part_of_torch("Triton", version_of("triton"), "retention without its GPU kernels"))
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    components.append(_part_of_torch("cuDNN", _cudnn_name(cudnn), "no fused attention"))
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a build without NCCL
        nccl = None
    components.append(_part_of_torch("NCCL", nccl, "no communication between GPUs; CPU runs use gloo"))
    return components


def _part_of_torch(name: str, version: str | None, cost: str) -> Component:
    return Component(name, version, "ok") if version else Component(name, None, "missing", note=cost)


def _cudnn_name(version: int | None) -> str | None:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else None


def choose(torch: Any, components: dict[str, Component]) -> list[Choice]:
    """What each part of training uses; needs a torch that imports."""
    from yoco_megatron import runtime

    gpu = runtime.has_gpu()
    engine, apex = components["Transformer Engine"], components["NVIDIA Apex"]
    has_engine = runtime.has_transformer_engine() and engine.state == "ok"
    why = (
        "installed, and there is a GPU"
        if has_engine
        else "no GPU"
        if not gpu
        else f"Transformer Engine: {engine.state}"
    )
    choices = [
        Choice("device", "CUDA, NCCL" if gpu else "CPU, gloo", components["GPU"].version or "torch sees no GPU"),
        Choice("linear layers, norms", "Transformer Engine" if has_engine else "plain torch", why),
        Choice("attention", "Transformer Engine (cuDNN)" if has_engine else "torch SDPA", why),
        *(_recurrence(torch, "cuda" if gpu else "cpu", name) for name in ("gated retention", "gated delta")),
    ]
    if has_engine:
        choices.append(Choice("optimizer", "Transformer Engine's fused Adam", "Megatron's first choice"))
    elif gpu and apex.state == "ok":
        choices.append(Choice("optimizer", "Apex's fused Adam", "Megatron's second choice; no Transformer Engine"))
    else:
        choices.append(Choice("optimizer", "torch AdamW", f"{why}; Apex: {apex.state}"))
    return choices


def _recurrence(torch: Any, device: str, name: str) -> Choice:
    """The backend of the op of this name."""
    wanted = {"device": torch.device(device), "dtype": torch.bfloat16, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    try:
        dispatch = importlib.import_module(f"yoco_megatron.ops.{name.replace(' ', '_')}.dispatch")
        refused = "; ".join(f"{name}: {reason}" for name, reason in dispatch.explain(**wanted).items() if reason)
        return Choice(name, dispatch.resolve_backend("auto", **wanted).name, refused or "first of the backends")
    except Exception as error:  # to be reported, not raised
        return Choice(name, "nothing", f"{type(error).__name__}: {error}")


def examine() -> tuple[list[Component], list[Choice]]:
    """All components, and the choices that follow ([] if torch does not import)."""
    python = platform.python_version()
    old = sys.version_info < (3, 12)
    note, fix = ("megatron-core 0.19 needs 3.12", "install Python 3.12") if old else ("", "")
    components = [Component("python", python, "wrong" if old else "ok", True, note, fix)]
    torch = import_torch()
    components += check_torch(torch)
    cuda = None if isinstance(torch, Exception) else torch.version.cuda
    components += [check_megatron(), check_transformer_engine(cuda), check_apex(), *map(check_package, PACKAGES)]
    choices = [] if isinstance(torch, Exception) else choose(torch, {one.name: one for one in components})
    return components, choices


def is_healthy(components: list[Component]) -> bool:
    """Whether training can start: every required component is ok, and no installed one is wrong."""
    return all(one.state == "ok" or (one.state == "missing" and not one.required) for one in components)


def as_text(components: list[Component], choices: list[Choice]) -> str:
    """The report as text tables."""
    width = max(len(row.version or "-") for row in components)
    lines = ["INSTALLED"]
    for one in components:
        state = f"{one.state}, required" if one.required and one.state == "missing" else one.state
        lines.append(f"  {one.name:22}  {one.version or '-':{width}}  {state:17}  {one.note}".rstrip())
    lines += ["", "TRAINING USES"]
    lines += [f"  {choice.part:22}  {choice.uses}  ({choice.why})" for choice in choices]
    if not choices:
        lines.append("  nothing: torch does not import")
    fixes = [f"  {one.name:22}  {one.fix}" for one in components if one.state != "ok" and one.fix]
    return "\n".join([*lines, *(["", "HOW TO INSTALL", *fixes] if fixes else [])])
