"""Prompts and answers through pretrain_yoco.py: packed whole, they train as each document alone does.

The data are read once in each step, as samples of several documents, or of one that is filled up by hand to the length
of a sample with tokens that are not learned. Tolerance: fp32 sums in another order over a few steps, losses printed
with 7 digits: 2e-6; norms of gradients are printed with three decimals.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from support.cli import TINY, Runs
from support.datasets import write

from yoco_megatron.data.packing import best_fit, number_of_samples

LENGTH, DOCUMENTS = 32, 12
FLAGS = [flag for flag in TINY if flag not in ("--mock-data", "--split", "90,5,5")]
LOSS = 2e-6
# All tokens with a loss weigh the same, whatever sample they are in.
STEPS = ["--micro-batch-size", "1", "--calculate-per-token-loss", "--train-iters", "4", "--save-interval", "2"]
SETS = ["--full-validation", "--multiple-validation-sets", "--eval-interval", "2"]


def test_packed_documents_train_as_each_alone(tmp_path: Path) -> None:
    """Also after a resume, and in validation. Half of a document is its prompt; one is longer than a sample."""
    generator = np.random.default_rng(7)
    lengths = np.array([40, *generator.integers(2, 20, DOCUMENTS - 1)])
    documents = [generator.integers(0, 250, length) for length in lengths]
    masks = [np.arange(length) >= length // 2 for length in lengths]
    packed = write(tmp_path / "packed", documents, loss_masks=masks)
    rest = [max(LENGTH - length, 0) for length in lengths]
    filled = [np.append(ids[:LENGTH], generator.integers(0, 250, size)) for ids, size in zip(documents, rest)]
    of_filled = [np.append(mask[:LENGTH], np.zeros(size)) for mask, size in zip(masks, rest)]
    alone = write(tmp_path / "alone", filled, loss_masks=of_filled)
    samples = number_of_samples(best_fit(lengths, LENGTH))
    assert samples <= DOCUMENTS / 2

    flags = [*FLAGS, *STEPS, *SETS, "--valid-data-path", packed, alone, "--global-batch-size"]
    of_packed = [*flags, str(samples), "--train-data-path", packed]
    saved = [str(tmp_path / name) for name in ("saved alone", "saved packed", "saved again")]
    runs = Runs(
        1,
        {
            "alone": [*flags, str(DOCUMENTS), "--train-data-path", alone, "--save", saved[0]],
            "packed": [*of_packed, "--save", saved[1]],
            "resumed": [*of_packed, "--load", saved[1], "--ckpt-step", "2", "--save", saved[2]],
        },
    )
    reference = runs["alone"]
    assert sorted(reference.losses) == sorted(runs["packed"].losses) == [1, 2, 3, 4]
    assert sorted(runs["resumed"].losses) == [3, 4]
    for log in (runs["packed"], runs["resumed"]):
        for step in log.losses:
            assert log.loss(step) == pytest.approx(reference.loss(step), rel=LOSS), f"step {step}"
            assert float(log.grad_norms[step]) == pytest.approx(float(reference.grad_norms[step]), abs=1.5e-3)
        by_set = [re.findall(rf"validation-{number} loss at .*?  lm loss (\S+)", log.text) for number in (0, 1)]
        assert len(by_set[0]) >= 2
        assert [float(loss) for loss in by_set[0]] == pytest.approx([float(loss) for loss in by_set[1]], rel=LOSS)
    assert f"{packed}, train: 12 whole documents in {samples} samples an epoch" in runs["packed"].text
