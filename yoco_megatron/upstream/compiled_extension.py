"""Megatron's C++ extension for selective recompute, compiled where no killed process can be in the way."""

import hashlib
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch.utils import cpp_extension

from yoco_megatron.upstream.registry import replaces

NAME = "share_storage_ext"


@replaces(
    "megatron.core.tensor_parallel.random",
    "_get_share_storage",
    digest="a546118b2c64c196",
    in_every_process=True,
    why="torch compiles it under a lock file: that of a process that was killed meanwhile stays, and every later "
    "process waits for it for ever, without a word",
)
def get_share_storage() -> Any:
    if random._share_storage_ext is None:
        random._share_storage_ext = _built() or _build()
    return random._share_storage_ext.share_storage


def _file() -> Path:
    """Of this source, torch, Python and machine alone, so that it is never compiled anew in its place."""
    versions = (random._SHARE_STORAGE_SRC, torch.__version__, sys.version, platform.machine())
    digest = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / f"{NAME}_{digest}.so"


def _built() -> ModuleType | None:
    if not _file().exists():
        return None
    spec = importlib.util.spec_from_file_location(NAME, _file())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build() -> ModuleType:
    """In a folder of this process, from which it is moved when it is whole: several may do so at once."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_file().parent, prefix=f"{NAME}_") as folder:
        module = cpp_extension.load_inline(
            NAME, random._SHARE_STORAGE_SRC, functions=["share_storage"], build_directory=folder
        )
        os.replace(Path(folder) / f"{NAME}.so", _file())
    return module
