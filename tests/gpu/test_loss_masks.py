"""Data with loss masks on GPUs: nothing in a micro-batch's new positions waits for the device, and losses are the same.

bf16, one step's loss: sums in another order, as in test_training.py.
"""

import numpy as np
import pytest
import torch
from gpu.test_training import LOSS_NOISE, pretrain
from support.datasets import write

from yoco_megatron.parallel.context.query_shard import QueryShard
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

pytestmark = pytest.mark.gpu
FLAGS = (
    "--config configs/model/yoco_tiny.yaml --tokenizer-type NullTokenizer --vocab-size 1000 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 2 --global-batch-size 16 --train-iters 4 --lr 1e-3 "
    "--log-interval 1 --eval-iters 0 --bf16 --split 1,0,0 --use-distributed-optimizer"
)


def test_the_host_does_not_wait() -> None:
    """Other runs in each micro-batch: their hidden states are taken, and given gradients, without an answer."""
    length, device = 4096, torch.device("cuda")
    hidden = torch.randn(length, 2, 64, device=device, requires_grad=True)
    shard, taken = SequenceShard(length, 2, device=device), []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in range(4):
            queries = QueryShard(shard, [(start, start + 100) for start in range(first, length - 100, 300)])
            taken.append((queries.positions(), queries.take(hidden)))
            taken[-1][1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for positions, rows in taken:
        assert torch.equal(rows, hidden[positions])
    assert hidden.grad.sum() == sum(rows.numel() for _, rows in taken)


def losses(gpus: int, flags: str) -> list[float]:
    return pretrain(f"{FLAGS} {flags}", gpus, CUDA_DEVICE_MAX_CONNECTIONS="1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Flags of documents with an answer at the end."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(60, 600, 300)
    documents = [generator.integers(0, 990, length) for length in lengths]
    masks = [np.arange(length) >= length - generator.integers(1, 90) for length in lengths]
    return f"--data-path {write(tmp_path_factory.mktemp('data') / 'data', documents, loss_masks=masks)}"


@pytest.fixture(scope="module")
def everywhere(data) -> list[float]:
    return losses(1, f"{data} --cross-decoder-positions all")


@pytest.mark.parametrize(
    ("gpus", "mesh"),
    [
        (1, ""),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--context-parallel-size 2"),
    ],
    ids=["one GPU", "TP2 SP", "PP2", "CP2"],
)
def test_packed_answers(gpus: int, mesh: str, data: str, everywhere: list[float]) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    found = losses(gpus, f"{data} {mesh}")
    assert len(found) == len(everywhere) == 4
    assert found == pytest.approx(everywhere, rel=LOSS_NOISE)
