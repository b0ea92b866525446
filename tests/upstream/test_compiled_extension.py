"""The C++ extension of selective recompute: no lock is waited for, and it is compiled once."""

import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import random
from torch.utils import cpp_extension, file_baton

from yoco_megatron.upstream import compiled_extension


@pytest.fixture
def other_process(monkeypatch):
    """As if this process had not loaded it yet; one that would wait for a lock ends."""
    monkeypatch.setattr(
        file_baton.FileBaton, "wait", lambda self: (_ for _ in ()).throw(TimeoutError("waits for ever"))
    )
    monkeypatch.setattr(random, "_share_storage_ext", None)
    return monkeypatch


def is_right(share_storage) -> bool:
    """Whether a tensor that was freed shows what another one holds."""
    source, freed = torch.arange(4.0), torch.zeros(4)
    view = freed[1:]
    freed.untyped_storage().resize_(0)
    share_storage(freed, source)
    return freed.tolist() == [0, 1, 2, 3] and view.tolist() == [1, 2, 3]


def test_it_is_compiled_once_and_a_lock_of_a_killed_process_is_no_matter(other_process, tmp_path):
    assert is_right(random._get_share_storage())
    built = compiled_extension._file()
    other_process.setattr(cpp_extension, "load_inline", lambda *a, **k: pytest.fail("compiles again"))
    other_process.setattr(random, "_share_storage_ext", None)
    assert is_right(random._get_share_storage())

    # With the folder of a compilation that was killed.
    other_process.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    killed = tmp_path / "share_storage_ext"
    killed.mkdir()
    (killed / "lock").touch()

    def compile_nothing(name, sources, functions, build_directory):
        shutil.copy(built, Path(build_directory) / f"{name}.so")
        return compiled_extension._built() or "compiled"

    other_process.setattr(cpp_extension, "load_inline", compile_nothing)
    assert compiled_extension._build() == "compiled"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["share_storage_ext", built.name])
    other_process.setattr(random, "_share_storage_ext", None)
    assert is_right(random._get_share_storage())


def test_megatrons_own_still_waits(other_process, tmp_path):
    other_process.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "share_storage_ext").mkdir()
    (tmp_path / "share_storage_ext" / "lock").touch()
    with pytest.raises(TimeoutError):
        compiled_extension.get_share_storage.original()
