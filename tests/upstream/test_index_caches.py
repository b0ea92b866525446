"""A cached index is an array of numbers, whole: nothing in a cache runs, and a damaged one is built again."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from yoco_megatron.data.dataset import CheckedGPTDataset, DatasetConfig
from yoco_megatron.upstream.index_caches import DamagedIndexError, load_index


def build(folder: Path, **flags: Any) -> Any:
    """A blend of two datasets with its caches below `folder`."""
    prefixes = [str(folder / name) for name in "ab"]
    for number, prefix in enumerate(prefixes, 3):
        if not Path(f"{prefix}.idx").exists():
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for length in range(2, 9 + number):
                builder.add_document(np.arange(length), [length])
            builder.finalize(f"{prefix}.idx")
    tokenizer = SimpleNamespace(eod=0, pad=98, vocab_size=99, unique_identifiers={})
    config = DatasetConfig(
        random_seed=1, sequence_length=8, blend_per_split=[(prefixes, [0.7, 0.3]), None, None], tokenizer=tokenizer,
        path_to_cache=str(folder / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, **flags,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(CheckedGPTDataset, [40, 0, 0], lambda: True, config).build()[0]


def indices(data: Any) -> list[np.ndarray]:
    parts = [(one.document_index, one.sample_index, one.shuffle_index) for one in data.datasets]
    return [np.array(index) for part in [*parts, (data.dataset_index, data.dataset_sample_index)] for index in part]


class Attack:
    """Leaves a file where Megatron's list of harmless classes leads: a tensor's storage is loaded by torch.load."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def attacks(mark: Path) -> dict[str, bytes]:
    inner = io.BytesIO()
    torch.save(Attack(mark), inner)

    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    objects = io.BytesIO()
    np.save(objects, np.array([Attack(mark)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    np.savez(archive, x=np.arange(3))
    return {
        "a pickle": pickle.dumps(Attack(mark)),
        "a storage": pickle.dumps(Storage()),
        "objects": objects.getvalue(),
        "an archive": archive.getvalue(),
    }


@pytest.mark.parametrize("name", ["a pickle", "a storage", "objects", "an archive"])
def test_nothing_in_a_cache_runs(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "index.npy"
    path.write_bytes(attacks(mark)[name])
    with pytest.raises(DamagedIndexError, match=rf"--data-cache-path: {path} is not .*: remove it"):
        load_index(str(path), allow_pickle=True, mmap_mode="r")
    assert not mark.exists()


def cut(index: np.ndarray, stream: io.BytesIO) -> None:
    np.save(stream, index)
    stream.truncate(stream.tell() - 4)


def emptied(index: np.ndarray, stream: io.BytesIO) -> None:
    """A machine that died: the file has its length, its last blocks were never written."""
    zeroed = index.copy()
    zeroed[len(index) // 2 :] = 0
    np.save(stream, zeroed)


def nothing(index: np.ndarray, stream: io.BytesIO) -> None:
    pass


def of_other_data(index: np.ndarray, stream: io.BytesIO) -> None:
    np.save(stream, index[: len(index) - 1])


def fractions(index: np.ndarray, stream: io.BytesIO) -> None:
    np.save(stream, index.astype(np.float32))


def one_number(index: np.ndarray, stream: io.BytesIO) -> None:
    np.save(stream, index.flat[0])


def two_columns(index: np.ndarray, stream: io.BytesIO) -> None:
    np.save(stream, np.stack([index, index], axis=-1))


def no_header(index: np.ndarray, stream: io.BytesIO) -> None:
    """As nothing of Python can be read: numpy's own parser raises other types than ValueError."""
    np.save(stream, index)
    stream.seek(10)
    stream.write(b"{'descr': (" + b" " * 40)


@pytest.mark.parametrize(
    "damage", [cut, emptied, nothing, of_other_data, fractions, one_number, two_columns, no_header]
)
def test_each_damaged_index_is_built_again(tmp_path: Path, damage: Any) -> None:
    whole = indices(build(tmp_path))
    paths = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(paths) == 2 * 3 + 2
    for path in paths:
        kept = path.read_bytes()
        stream = io.BytesIO()
        damage(np.load(path), stream)
        path.unlink()
        path.write_bytes(stream.getvalue())
        found = indices(build(tmp_path))
        assert all(np.array_equal(one, other) for one, other in zip(found, whole, strict=True))
        assert path.read_bytes() == kept, path.name


def test_a_cache_that_is_only_read_is_not_touched(tmp_path: Path) -> None:
    """With --dataloader-fast-cache-load all ranks read at once, and none may build."""
    build(tmp_path)
    path = next((tmp_path / "cache").glob("*sample_index.npy"))
    content = path.read_bytes()[:-4]
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=path.name):
        build(tmp_path, fast_cache_load=True)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(ValueError, match=rf"--data-cache-path: .*{path.name} is missing: tools/prepare_cache.py"):
        build(tmp_path, fast_cache_load=True)
