"""Prompts and answers through pretrain_yoco.py: packed whole, they train as each document alone does.

The data are read once in each step, as samples of several documents, or of one that is filled up by hand to the length
of a sample with tokens that are not learned. Tolerance: fp32 sums in another order over a few steps, losses printed
with 7 digits: 2e-6; norms of gradients are printed with three decimals.
"""

import numpy as np
import pytest
from support.cli import TINY, Runs
from support.datasets import write

from yoco_megatron.data.packing import best_fit, number_of_samples

LENGTH, DOCUMENTS = 32, 12
FLAGS = [flag for flag in TINY if flag != "--mock-data"]
# All tokens with a loss weigh the same, whatever sample they are in.
STEPS = [
    "--micro-batch-size",
    "1",
    "--calculate-per-token-loss",
    "--train-iters",
    "4",
    "--split",
    "1,0,0",
    "--eval-iters",
    "0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags of both. The prompt of a document is of half its tokens; one document is longer than a sample."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(7)
    lengths = np.array([40, *generator.integers(2, 20, DOCUMENTS - 1)])
    documents = [generator.integers(0, 250, length) for length in lengths]
    masks = [np.arange(length) >= length // 2 for length in lengths]
    samples = number_of_samples(best_fit(lengths, LENGTH))
    assert samples <= DOCUMENTS / 2
    fill = [LENGTH - length for length in np.minimum(lengths, LENGTH)]
    alone = [np.append(ids[:LENGTH], generator.integers(0, 250, size)) for ids, size in zip(documents, fill)]
    of_alone = [np.append(mask[:LENGTH], np.zeros(size)) for mask, size in zip(masks, fill)]
    packed = write(folder / "packed", documents, loss_masks=masks)
    one_each = write(folder / "alone", alone, loss_masks=of_alone)
    return {
        "packed": ["--data-path", packed, "--global-batch-size", str(samples)],
        "alone": ["--data-path", one_each, "--global-batch-size", str(DOCUMENTS)],
    }


def test_packed_documents_train_as_each_alone(data: dict[str, list[str]]) -> None:
    runs = Runs(1, {name: [*FLAGS, *STEPS, *flags] for name, flags in data.items()})
    packed, alone = runs["packed"], runs["alone"]
    assert len(packed.losses) == len(alone.losses) == 4
    for step in alone.losses:
        assert packed.loss(step) == pytest.approx(alone.loss(step), rel=2e-6), f"step {step}"
        assert float(packed.grad_norms[step]) == pytest.approx(float(alone.grad_norms[step]), abs=1.5e-3)
    assert "whole documents in" in packed.text
