"""Document masks and context parallelism through pretrain_yoco.py: from a .bin/.idx of short documents to the loss.

Tolerance: fp32 sums in another order over a few steps, losses printed with 7 digits: 2e-6; norms of gradients are
printed with three decimals.
"""

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from support.cli import TINY, TINY_BASELINE, run_script, train
from support.models import SELF_DECODERS

LOSS = 2e-6
EOD = NullTokenizer(255).eod
MASK = "--dataloader-inter-document-masking"
FLAGS, BASELINE = ([flag for flag in model if flag != "--mock-data"] for model in (TINY, TINY_BASELINE))
PP = "--pipeline-model-parallel-size"
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
CP2 = ("--context-parallel-size", "2")
MESHES = {
    "PP4": (4, (PP, "4")),
    "TP2 PP2 SP": (4, (PP, "2", *TP2)),
    "CP4": (4, ("--context-parallel-size", "4")),
    "TP2 CP2 SP": (4, (*CP2, *TP2)),
    "PP2 VP2 CP2": (4, (*CP2, PP, "2", "--num-virtual-stages-per-pipeline-rank", "2")),
    "DP2 CP2 distributed optimizer": (4, (*CP2, "--use-distributed-optimizer")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Documents of 1 to 20 tokens and an end-of-document: several in each sample of 32."""
    prefix = str(tmp_path_factory.mktemp("data") / "short_text_document")
    builder = IndexedDatasetBuilder(get_bin_path(prefix))
    generator = torch.Generator().manual_seed(3)
    for length in torch.randint(1, 21, (600,), generator=generator).tolist():
        tokens = torch.randint(0, 250, (length,), generator=generator).tolist()
        builder.add_document(torch.tensor([*tokens, EOD]), [length + 1])
    builder.finalize(get_idx_path(prefix))
    return prefix


def run(size: int, data: str, *flags: str):
    return train(size, "--train-iters", "6", "--data-path", data, *flags, base=FLAGS)


@pytest.fixture(scope="module")
def one_process(data: str):
    """The reference of each self-decoder, computed once. Losses at documents' ends do not count."""
    return {kind: run(1, data, "--self-decoder", kind, MASK, "--eod-mask-loss") for kind in SELF_DECODERS}


@pytest.mark.parametrize(("mesh", "kind"), zip(MESHES, SELF_DECODERS * 3))
def test_equals_one_process(mesh: str, kind: str, data: str, one_process) -> None:
    """Every stage and rank keeps documents apart, and tokens count alike wherever the masked ones lie."""
    reference, (size, flags) = one_process[kind], MESHES[mesh]
    log = run(size, data, "--self-decoder", kind, MASK, "--eod-mask-loss", *flags)
    assert len(reference.losses) >= 5
    for step in reference.losses:
        assert log.loss(step) == pytest.approx(reference.loss(step), rel=LOSS), f"step {step}"
        assert float(log.grad_norms[step]) == pytest.approx(float(reference.grad_norms[step]), abs=1.5e-3)
    assert {k: float(v) for k, v in log.validation.items()} == pytest.approx(
        {k: float(v) for k, v in reference.validation.items()}, rel=LOSS
    )


def test_the_flag_matters(data: str, one_process) -> None:
    plain = run(1, data, "--eod-mask-loss")
    assert abs(one_process["gated_retention"].loss(1) - plain.loss(1)) > 1e-4


def test_tokens_are_counted_over_the_mesh(data: str) -> None:
    """--calculate-per-token-loss: Megatron divides by all tokens of the step."""
    flags = (MASK, "--eod-mask-loss", "--calculate-per-token-loss")
    reference, log = run(1, data, *flags), run(2, data, *flags, *CP2)
    for step in reference.losses:
        assert log.loss(step) == pytest.approx(reference.loss(step), rel=LOSS), f"step {step}"


def test_checkpoints_do_not_know_the_mesh(data: str, tmp_path) -> None:
    """Saved with two context-parallel ranks after three steps, continued with one process."""
    save = ("--use-distributed-optimizer", "--save", str(tmp_path), "--save-interval", "3")
    run(2, data, MASK, *CP2, *save, "--exit-interval", "3")
    resumed = run(1, data, MASK, "--use-distributed-optimizer", "--load", str(tmp_path))
    whole = run(1, data, MASK)
    assert resumed.loss(6) == pytest.approx(whole.loss(6), rel=LOSS)


def test_the_baseline_refuses(data: str) -> None:
    code, text = run_script(1, *BASELINE, "--data-path", data, MASK)[0]
    assert code == 2
    assert f"{MASK} is refused on --architecture transformer" in text
