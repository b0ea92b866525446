"""Data with loss masks of their own: the cross-decoder computes other positions in each micro-batch, same training."""

import re

import numpy as np
import pytest
import torch
from support.cli import TINY, Log, _main, checkpoint, parsed, train
from support.datasets import write

from yoco_megatron.costs.flops import Queries, train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.parallel.context.query_runs import num_visible_keys, runs_of

LENGTH, STEPS, BATCH = 512, 4, 8
SEQUENCE = ["--seq-length", str(LENGTH)]
FLAGS = [
    *SEQUENCE,
    "--train-iters",
    str(STEPS),
    "--eval-interval",
    str(STEPS),
    "--eval-iters",
    "1",
    "--num-workers",
    "0",
]
FLAGS += ["--global-batch-size", str(BATCH), "--micro-batch-size", "1", "--eval-micro-batch-size", "2"]
NO_MOCK = [flag for flag in TINY if flag != "--mock-data"]
PRINTED = 2e-6  # losses have seven digits

# Where a sample has a loss: answers, nothing, a suffix, all, here and there; and the rows that are computed for it.
RUNS = [[(100, 140), (300, 420)], [], [(LENGTH - 50, LENGTH)], [(0, LENGTH)], [(7, 8), (200, 203)]]
ROWS = [256, 1, 128, LENGTH, 128]


def mask_of(sample: int) -> torch.Tensor:
    mask = torch.zeros(LENGTH)
    for start, stop in RUNS[sample % len(RUNS)]:
        mask[start:stop] = 1
    return mask


def _masked(flags: list[str]) -> None:
    """Train on mock data with masks; print which samples are read, and how many rows the head sees."""
    import pretrain_yoco
    from yoco_megatron.data.dataset import CheckedMockDataset
    from yoco_megatron.model.yoco_model import YOCOModel

    parse, read, head = pretrain_yoco.parse_and_validate, CheckedMockDataset.__getitem__, YOCOModel.head

    def parse_masked(argv):
        args, model = parse(argv)
        args.has_loss_masks = True  # mock data have none
        return args, model

    def read_masked(dataset, index):
        print(f"sample {index or 0}")
        sample = read(dataset, index)
        return sample | {"loss_mask": sample["loss_mask"] * mask_of(index or 0)}

    def head_of_rows(model, hidden_states, labels):
        print(f"rows {len(hidden_states)}")
        return head(model, hidden_states, labels)

    pretrain_yoco.parse_and_validate = parse_masked
    CheckedMockDataset.__getitem__, YOCOModel.head = read_masked, head_of_rows
    _main(flags)


def run(world_size: int, *flags: str) -> Log:
    return train(world_size, *FLAGS, *flags, entry=_masked)


def numbers(name: str, log: Log) -> list[int]:
    """Of the samples of the training steps, in their order."""
    return [int(number) for number in re.findall(rf"^{name} (\d+)$", log.text, re.M)][: STEPS * BATCH]


def positions(log: Log) -> list[str]:
    return re.findall(r"positions with a loss .*?  positions computed .*", log.text)


def assert_same_losses(log: Log, reference: Log) -> None:
    assert list(log.losses) == list(reference.losses) == list(range(1, STEPS + 1))
    for step in log.losses:
        assert log.loss(step) == pytest.approx(reference.loss(step), rel=PRINTED)
    assert log.validation.keys() == reference.validation.keys() and log.validation
    for of_part, loss in log.validation.items():
        assert float(loss) == pytest.approx(float(reference.validation[of_part]), rel=PRINTED)


def flops_of(folder) -> float:
    """The total that the last checkpoint has."""
    return checkpoint(folder, STEPS)["common_state/shard_0_1"][0]["num_floating_point_operations_so_far"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def one_process(folder) -> Log:
    return run(1, "--save", str(folder), "--save-interval", "2")


def test_only_what_is_needed_is_computed(one_process):
    """Losses are those of the computation of all positions, and no layer behind the shared K,V sees more rows."""
    everywhere = run(1, "--cross-decoder-positions", "all")
    assert_same_losses(one_process, everywhere)
    samples = numbers("sample", one_process)
    assert samples == numbers("sample", everywhere) and {sample % len(RUNS) for sample in samples} == set(
        range(len(RUNS))
    )
    assert numbers("rows", one_process) == [ROWS[sample % len(RUNS)] for sample in samples]
    assert set(numbers("rows", everywhere)) == {LENGTH} and not positions(everywhere)


def test_what_was_done_is_counted(one_process, folder):
    samples, rows = numbers("sample", one_process), numbers("rows", one_process)
    with_loss = [int(mask_of(sample).sum()) for sample in samples]
    for step, line in enumerate(positions(one_process)):
        of_step = slice(step * BATCH, (step + 1) * BATCH)
        shares = [100 * sum(part[of_step]) / (BATCH * LENGTH) for part in (with_loss, rows)]
        assert line == "positions with a loss {:.1f}%  positions computed {:.1f}%".format(*shares)
    runs = [runs_of(mask_of(sample).numpy() != 0) or ((0, LENGTH),) for sample in samples]
    keys = sum(num_visible_keys(of_sample, np.zeros(1, np.int64)) for of_sample in runs)
    queries = Queries(sum(rows) / len(rows) / LENGTH, keys / len(rows) / LENGTH)
    wanted = train_flops(ModelShape.from_args(parsed(1, *SEQUENCE)), STEPS * BATCH, queries)
    assert flops_of(folder) == pytest.approx(wanted, rel=1e-12)


def test_data_parallel_ranks_count_together_also_after_a_resume(one_process, folder, tmp_path):
    saving = ["--save", str(tmp_path), "--save-interval", "3", "--log-interval", "2"]
    undisturbed = run(2, *saving)
    assert flops_of(tmp_path) == flops_of(folder)
    resumed = run(2, *saving, "--load", str(tmp_path), "--ckpt-step", "3")
    assert re.search(r"with a loss [\d.]+% \([\d.]+ to [\d.]+\)", positions(resumed)[0])
    assert positions(resumed) == positions(undisturbed)[-1:]
    assert flops_of(tmp_path) == flops_of(folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[str]:
    """Flags of documents with an answer at the end, of which several are packed in a sample."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(40, 400, 100)
    documents = [generator.integers(0, 250, length) for length in lengths]
    masks = [np.arange(length) >= length - generator.integers(1, 40) for length in lengths]
    data = write(tmp_path_factory.mktemp("answers") / "data", documents, loss_masks=masks)
    return ["--data-path", data, "--split", "8,1,1"]


@pytest.fixture(scope="module")
def answers_everywhere(answers) -> Log:
    return train(1, *FLAGS, *answers, "--cross-decoder-positions", "all", base=NO_MOCK)


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, "--context-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-layout Et|t|t|tL"),
    ],
    ids=["CP2", "TP2 PP2 VP2 SP"],
)
def test_packed_answers(processes, mesh, answers, answers_everywhere):
    if processes == 4:
        mesh += " --pipeline-model-parallel-size 2"
    log = train(processes, *FLAGS, *answers, *mesh.split(), base=NO_MOCK)
    assert_same_losses(log, answers_everywhere)
    assert len(positions(log)) == STEPS
