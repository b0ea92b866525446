"""Every test imports Megatron through the runtime, as users do; GPU tests are skipped, visibly, where there is none."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import pytest
import torch
from support.disks import small_disk

# The longest files, which start first (make test): one of them at the end would leave the other workers idle.
LONG = (
    "launch/test_slurm.py",  # waits for most of its time
    "parallel/test_context_parallel.py",
    "parallel/test_pipeline.py",
    "convert/test_convert.py",
    "test_survival.py",
    "test_resume.py",
    "parallel/test_experts.py",
    "parallel/test_query_shard.py",
    "distillation/test_distillation.py",
    "benchmarks/test_length_extension.py",
    "test_sequences.py",
    "ops/test_retention_kernels.py",
    "hf/test_folder.py",
    "distillation/test_transfer.py",
    "test_meshes.py",
    "test_pipeline_training.py",
    "evaluation/test_in_training.py",
    "evaluation/test_mesh_backend.py",
    "launch/test_status_and_local.py",
    "dry_run/test_confirm.py",
    "costs/test_traffic.py",
    "parallel/test_parity.py",
    "benchmarks/test_inference.py",
    "convert/test_convert_memory.py",
    "corpus/test_preprocess_resume.py",
    "parallel/test_context_parallel_kernels.py",
    "test_experts.py",
    "training/test_loss_masks.py",
    "tools/test_generate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / file: index for index, file in enumerate(LONG)}
    assert all(path.exists() for path in place)
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
    for item in items:
        if item.get_closest_marker("gpu") and not runtime.has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: make test-gpu"))


@pytest.fixture(autouse=True)
def no_state_machine() -> Iterator[None]:
    """Megatron makes its rerun state machine when it is first asked for: the next test would go on with this one's."""
    yield
    if machine := sys.modules.get("megatron.core.rerun_state_machine"):
        machine.destroy_rerun_state_machine()


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh random inputs in every test, the same in every run."""
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31 if os.environ.get("FRESH") else 20240508)


@pytest.fixture
def one_process():
    """Megatron's groups for a world of one, in this process."""
    from support.worlds import process_groups

    with process_groups(rank=0, world_size=1):
        yield


@pytest.fixture
def disk_of(tmp_path):
    """Make a file system of so many bytes."""
    with contextlib.ExitStack() as mounts:
        yield lambda size: mounts.enter_context(small_disk(tmp_path / "disk", size))


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens; not to be changed."""
    from yoco_megatron.corpus.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": f"the {n} quick größer foxes = {n * n}, return x_{n % 7}"}) for n in range(400)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    train_tokenizer([folder / "corpus.jsonl"], 400, folder / "bpe")
    return folder / "bpe"
