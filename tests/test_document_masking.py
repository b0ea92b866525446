"""`--dataloader-inter-document-masking` through pretrain_yoco.py: from a .bin/.idx of short documents to the loss.

Tolerance: fp32 sums in another order over a few steps, losses printed with 7 digits: 2e-6.
"""

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from support.cli import TINY, run_script, train
from support.models import SELF_DECODERS

LOSS = 2e-6
MASK = "--dataloader-inter-document-masking"
FLAGS = [flag for flag in TINY if flag != "--mock-data"]
PP = "--pipeline-model-parallel-size"
MESHES = {
    "PP4": (4, (PP, "4")),
    "TP2 PP2 SP": (4, (PP, "2", "--tensor-model-parallel-size", "2", "--sequence-parallel")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Documents of 1 to 20 tokens: several in each sample of 32."""
    prefix = str(tmp_path_factory.mktemp("data") / "short_text_document")
    builder = IndexedDatasetBuilder(get_bin_path(prefix))
    generator = torch.Generator().manual_seed(3)
    for length in torch.randint(1, 21, (600,), generator=generator).tolist():
        builder.add_document(torch.randint(0, 255, (length,), generator=generator), [length])
    builder.finalize(get_idx_path(prefix))
    return prefix


def run(size: int, data: str, *flags: str):
    return train(size, "--train-iters", "6", "--data-path", data, *flags, base=FLAGS)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_every_stage_masks(kind: str, data: str) -> None:
    masked = run(1, data, "--self-decoder", kind, MASK)
    plain = run(1, data, "--self-decoder", kind)
    assert abs(masked.loss(1) - plain.loss(1)) > 1e-4, "the flag has no effect"
    size, flags = MESHES["PP4" if kind == SELF_DECODERS[0] else "TP2 PP2 SP"]
    log = run(size, data, "--self-decoder", kind, MASK, *flags)
    for step in masked.losses:
        assert log.loss(step) == pytest.approx(masked.loss(step), rel=LOSS), f"step {step}"
    assert {k: float(v) for k, v in log.validation.items()} == pytest.approx(
        {k: float(v) for k, v in masked.validation.items()}, rel=LOSS
    )


def test_the_baseline_refuses(data: str) -> None:
    code, text = run_script(1, *FLAGS, "--data-path", data, "--architecture", "transformer", MASK)[0]
    assert code == 2
    assert f"{MASK} is built for --architecture yoco alone" in text
