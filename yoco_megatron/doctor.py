"""What is installed here, what training will therefore run on, and what a missing piece costs: `tools/doctor.py`.

Versions come from the packages' metadata and presence from their files; nothing but torch is imported, because some of
these packages are slow to import and some break others when imported.
"""

import importlib.metadata
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "missing", "wrong"]
# Heads of YOCO-3B, by which the retention kernels are asked whether they can serve.
HEAD_DIM = 128


@dataclass(frozen=True)
class Piece:
    """One thing that may be installed. `note` says what lacks without it, or what is wrong; `fix` how to get it."""

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
    """A distribution whose version alone decides: its `minimum`, below which it is wrong, and what it is for."""

    name: str
    distribution: str
    cost: str
    required: bool = False
    minimum: tuple[int, ...] = ()
    below: str = "too old"


PACKAGES = [
    Package("flash-linear-attention", "flash-linear-attention", "only benchmarks compare with it"),
    Package("transformers", "transformers", "no Hugging Face tokenizer or export", True, (5,)),
    Package("tokenizers", "tokenizers", "no tokenizer can be trained, data are not preprocessed", True),
    Package("safetensors", "safetensors", "no export to Hugging Face"),
    Package(
        "nvidia-resiliency-ext", "nvidia-resiliency-ext", "no ft_launcher, no --inprocess-restart", False, (0, 6),
        "harmful: before 0.6.0 its presence makes `import megatron.core` 0.19 crash",
    ),
    Package("psutil", "psutil", "checkpoints cannot be saved", True),
    Package("pyyaml", "pyyaml", "configs cannot be read", True),
    Package("tqdm", "tqdm", "the data tools do not start"),
    Package("tensorboard", "tensorboard", "no curves with --tensorboard-dir"),
    Package("wandb", "wandb", "no logging with --wandb-project"),
    Package("nltk", "nltk", "no sentence splitting"),
]  # fmt: skip


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, from its metadata; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(module: str) -> Path | None:
    """Folder of a top-level package, without importing it; None if there is none."""
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_package(package: Package) -> Piece:
    """A piece of which only the version matters."""
    version = version_of(package.distribution)
    wanted = ".".join(map(str, package.minimum))
    fix = f'pip install "{package.distribution}>={wanted}"' if wanted else f"pip install {package.distribution}"
    if version is None:
        return Piece(package.name, None, "missing", package.required, package.cost, fix)
    if _numbers(version) < package.minimum:
        return Piece(package.name, version, "wrong", package.required, package.below, fix)
    return Piece(package.name, version, "ok", package.required)


def check_megatron() -> Piece:
    version, fix = version_of("megatron-core"), 'pip install "megatron-core==0.19.*"'
    if version is None:
        return Piece("megatron-core", None, "missing", True, "it is the trainer: nothing runs without it", fix)
    if _numbers(version)[:2] != (0, 19):
        return Piece("megatron-core", version, "wrong", True, "this project extends 0.19 and no other", fix)
    return Piece("megatron-core", version, "ok", True)


def check_apex() -> Piece:
    """NVIDIA Apex, told apart from the unrelated project that has the name `apex` on PyPI."""
    version, folder = version_of("apex"), folder_of("apex")
    fix = "build it from source: github.com/NVIDIA/apex (never `pip install apex`)"
    cost = "nothing beside Transformer Engine; with neither, the optimizer is torch's, which is not fused"
    if version is None and folder is None:
        return Piece("NVIDIA Apex", None, "missing", False, cost, fix)
    if folder is None or not (folder / "optimizers").is_dir() or not (folder / "contrib").is_dir():
        note = (
            "this is PyPI's `apex`, another project, not NVIDIA Apex; Megatron takes `import apex` as proof of fused "
            "norms that it does not have"
        )
        return Piece("NVIDIA Apex", version, "wrong", False, note, f"pip uninstall apex; then {fix}")
    if importlib.util.find_spec("amp_C") is None:
        note = "built without its CUDA extensions (no amp_C): its optimizers cannot run"
        return Piece("NVIDIA Apex", version, "wrong", False, note, fix)
    return Piece("NVIDIA Apex", version, "ok")


def check_transformer_engine(cuda: str | None) -> Piece:
    """Transformer Engine with its PyTorch half; `cuda` is torch's CUDA version, None for a CPU build."""
    version = version_of("transformer-engine") or version_of("transformer-engine-torch")
    core = f"core_cu{_numbers(cuda)[0]}" if cuda else "core_cu13"
    fix = f'pip install --no-build-isolation "transformer-engine[pytorch,{core}]" (needs nvcc)'
    folder = folder_of("transformer_engine")
    if folder is None:
        note = "no fused norm and linear layers, no FP8, slower attention; not needed without a GPU"
        return Piece("Transformer Engine", None, "missing", False, note, fix)
    places = (folder, folder / "wheel_lib", folder.parent)
    if not any(path for place in places for path in place.glob("transformer_engine_torch*.so")):
        note = "without its PyTorch half (transformer_engine_torch), so that it cannot be imported"
        return Piece("Transformer Engine", version, "wrong", False, note, fix)
    return Piece("Transformer Engine", version or "?", "ok")


def import_torch() -> Any:
    """torch, or the exception that its import raises."""
    try:
        import torch
    except Exception as error:  # a missing library is an ImportError or an OSError
        return error
    return torch


def check_torch(torch: Any) -> list[Piece]:
    """torch, what it was built with, and the GPUs it sees."""
    version = version_of("torch")
    if isinstance(torch, Exception):
        note = f"it does not import: {torch}" if version else "everything is built on it"
        return [Piece("torch", version, "wrong" if version else "missing", True, note, 'pip install "torch==2.11.*"')]
    from yoco_megatron import runtime

    pieces = [Piece("torch", torch.__version__, "ok", True)]
    pieces.append(_part_of_torch("CUDA", torch.version.cuda, "this torch is a CPU build"))
    count = torch.cuda.device_count() if runtime.has_gpu() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    pieces.append(_part_of_torch("GPU", gpus or None, "training runs on the CPU, for correctness only"))
    pieces.append(_part_of_torch("Triton", version_of("triton"), "retention without its GPU kernels"))
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    pieces.append(_part_of_torch("cuDNN", _cudnn_name(cudnn), "no fused attention"))
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a build without NCCL
        nccl = None
    pieces.append(_part_of_torch("NCCL", nccl, "no communication between GPUs; CPU runs use gloo"))
    return pieces


def _part_of_torch(name: str, version: str | None, cost: str) -> Piece:
    return Piece(name, version, "ok") if version else Piece(name, None, "missing", note=cost)


def _cudnn_name(version: int | None) -> str | None:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else None


def choose(torch: Any, pieces: dict[str, Piece]) -> list[Choice]:
    """What each part of training uses; needs a torch that imports."""
    from yoco_megatron import runtime

    gpu = runtime.has_gpu()
    engine, apex = pieces["Transformer Engine"], pieces["NVIDIA Apex"]
    has_engine = runtime.has_transformer_engine() and engine.state == "ok"
    why = (
        "installed, and there is a GPU"
        if has_engine
        else "no GPU"
        if not gpu
        else f"Transformer Engine: {engine.state}"
    )
    choices = [
        Choice("device", "CUDA, NCCL" if gpu else "CPU, gloo", pieces["GPU"].version or "torch sees no GPU"),
        Choice("linear layers, norms", "Transformer Engine" if has_engine else "plain torch", why),
        Choice("attention", "Transformer Engine (cuDNN)" if has_engine else "torch SDPA", why),
        _retention(torch, "cuda" if gpu else "cpu"),
    ]
    if has_engine:
        choices.append(Choice("optimizer", "Transformer Engine's fused Adam", "Megatron's first choice"))
    elif gpu and apex.state == "ok":
        choices.append(Choice("optimizer", "Apex's fused Adam", "Megatron's second choice; no Transformer Engine"))
    else:
        choices.append(Choice("optimizer", "torch AdamW", f"{why}; Apex: {apex.state}"))
    resilient = pieces["nvidia-resiliency-ext"].state == "ok"
    writer = "nvidia-resiliency-ext" if resilient else "Megatron's own writer"
    choices.append(Choice("--async-save", writer, f"nvidia-resiliency-ext: {pieces['nvidia-resiliency-ext'].state}"))
    return choices


def _retention(torch: Any, device: str) -> Choice:
    wanted = {"device": torch.device(device), "dtype": torch.bfloat16, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM}
    try:
        from yoco_megatron.ops.gated_retention.dispatch import explain, resolve_backend

        refused = "; ".join(f"{name}: {reason}" for name, reason in explain(**wanted).items() if reason)
        return Choice("gated retention", resolve_backend("auto", **wanted).name, refused or "first of the backends")
    except Exception as error:  # the doctor reports what is broken; it does not break with it
        return Choice("gated retention", "nothing", f"{type(error).__name__}: {error}")


def examine() -> tuple[list[Piece], list[Choice]]:
    """All pieces, and the choices that follow from them (none if torch does not import)."""
    python = platform.python_version()
    old = sys.version_info < (3, 12)
    note = "megatron-core 0.19 needs 3.12" if old else ""
    pieces = [Piece("python", python, "wrong" if old else "ok", True, note, "install Python 3.12" if old else "")]
    torch = import_torch()
    pieces += check_torch(torch)
    cuda = None if isinstance(torch, Exception) else torch.version.cuda
    pieces += [check_megatron(), check_transformer_engine(cuda), check_apex(), *map(check_package, PACKAGES)]
    choices = [] if isinstance(torch, Exception) else choose(torch, {piece.name: piece for piece in pieces})
    return pieces, choices


def is_healthy(pieces: list[Piece]) -> bool:
    """Whether training can start: all that is required is there, and nothing is installed that is wrong."""
    return all(piece.state == "ok" or (piece.state == "missing" and not piece.required) for piece in pieces)


def as_text(pieces: list[Piece], choices: list[Choice]) -> str:
    """The tables that a person reads."""
    width = max(len(row.version or "-") for row in pieces)
    lines = ["INSTALLED"]
    for piece in pieces:
        state = f"{piece.state}, required" if piece.required and piece.state == "missing" else piece.state
        lines.append(f"  {piece.name:22}  {piece.version or '-':{width}}  {state:17}  {piece.note}".rstrip())
    lines += ["", "TRAINING USES"]
    lines += [f"  {choice.part:22}  {choice.uses}  ({choice.why})" for choice in choices]
    if not choices:
        lines.append("  nothing: torch does not import")
    fixes = [f"  {piece.name:22}  {piece.fix}" for piece in pieces if piece.state != "ok" and piece.fix]
    return "\n".join([*lines, *(["", "HOW TO INSTALL", *fixes] if fixes else [])])
