"""--full-validation and --multiple-validation-sets: the loss is the mean over exactly the samples of each set."""

import re

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.cli import TINY, Log, Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BASE = [flag for flag in TINY if flag not in ("--mock-data", "--split", "90,5,5")]
BASE += ["--num-workers", "0", "--lr", "0", "--min-lr", "0"]  # the weights stay what they are
PIPELINE = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
LENGTH = 32  # tokens of a sample


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, int]:
    """Prefixes of three datasets, and how many samples they hold, which are no whole batches of 8."""
    folder, samples = tmp_path_factory.mktemp("data"), {}
    for seed, name in enumerate("abc"):
        prefix, generator = f"{folder}/{name}", torch.Generator().manual_seed(seed)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        lengths = [70] * (6 + 3 * seed)
        for length in lengths:
            builder.add_document(torch.randint(0, 255, (length,), generator=generator), [length])
        builder.finalize(f"{prefix}.idx")
        samples[prefix] = (sum(lengths) - 1) // LENGTH
    return samples


def losses(log: Log) -> list[tuple[str, str, str]]:
    """(name of the set or nothing, when, loss) of all evaluations."""
    return re.findall(r" validation(\S*) loss at (.*?)  lm loss (\S+) ", log.text)


def test_each_sample_counts_once_on_any_mesh(data, tmp_path):
    a, b, c = data
    sets = ["--full-validation", "--eval-iters", "0", "--train-data-path", a, "--valid-data-path", b, c]
    named = [*sets, "--multiple-validation-sets", "--validation-set-names", "b", "c"]
    two_steps = ["--train-iters", "2", "--lr-warmup-iters", "0", "--eval-interval", "1"]

    def one_at_a_time(prefix: str) -> list[str]:
        sizes = ["--micro-batch-size", "1", "--global-batch-size", "1", "--eval-iters", str(data[prefix])]
        return [*BASE, "--skip-train", *sizes, "--train-data-path", a, "--valid-data-path", prefix]

    one = Runs(
        1,
        {
            "b": one_at_a_time(b),
            "c": one_at_a_time(c),
            "named": [*BASE, *named, *two_steps, "--tensorboard-dir", str(tmp_path)],
            "pooled": [*BASE, *sets, "--skip-train"],
        },
    )
    two = Runs(2, {"pipeline": [*BASE, *named, *PIPELINE, "--skip-train"]})
    assert [data[prefix] % 8 for prefix in (b, c)] == [3, 2], "samples are missing to whole batches"
    own = {name: float(losses(one[name])[0][2]) for name in "bc"}
    assert abs(own["b"] - own["c"]) > 1e-3, "else they cannot be told apart"

    told = losses(one["named"])
    ends = ["iteration 1", "iteration 2", "iteration 2 on validation set"]
    assert [(name, when) for name, when, _ in told] == [(name, when) for when in ends for name in ("-b", "-c")]
    for name, _, loss in [*told, *losses(two["pipeline"])]:
        assert float(loss) == pytest.approx(own[name[1:]], abs=2e-6)
    assert len(losses(two["pipeline"])) == 2
    ((_, _, pooled),) = losses(one["pooled"])
    mean = (own["b"] * data[b] + own["c"] * data[c]) / (data[b] + data[c])
    assert float(pooled) == pytest.approx(mean, abs=2e-6)

    curves = EventAccumulator(str(tmp_path))
    curves.Reload()
    for name in "bc":
        (first, *_) = curves.Scalars(f"lm loss validation-{name}")
        assert first.step == 1 and first.value == pytest.approx(own[name], abs=2e-6)
