"""--z-loss-coeff: the model's second loss is the square of the logarithm of the softmax's sum, masked and weighted.

Gradients through the head are held against float64 in tests/ops/test_linear_cross_entropy.py.
"""

from types import SimpleNamespace

import pytest
import torch
from support.cli import TINY, TINY_BASELINE, train
from support.models import batch, build, relative_error, tiny_config

from yoco_megatron.startup import arguments
from yoco_megatron.training import step


def test_the_models_second_loss_is_that_of_its_logits(one_process):
    """Trained on what the weighted sum of `loss_func` makes of both; Megatron's fp32 sums, 1e-6."""
    coeff, (tokens, labels) = 0.3, batch()
    mask = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.7).float()
    model = build(tiny_config(loss_chunk_size=7, z_loss_coeff=coeff, params_dtype=torch.float64))
    args = SimpleNamespace(teacher=None, mtp_num_layers=None, z_loss_coeff=coeff, check_for_nan_in_loss_and_grad=False)
    args = SimpleNamespace(**vars(args), check_for_spiky_loss=False, calculate_per_token_loss=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "get_args", lambda: args)
        loss, count, report = step.loss_func(mask, model(tokens, labels=labels))
    loss.backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens)
    log_sum = logits.logsumexp(-1)
    ce = log_sum - logits.gather(-1, labels[..., None]).squeeze(-1)
    wanted = ((ce + coeff * log_sum.square()) * mask).sum()
    wanted.backward()
    assert relative_error(loss, wanted) < 1e-6 and count == mask.sum()
    assert report["lm loss"][0].item() == pytest.approx((ce * mask).sum().item(), rel=1e-6)
    assert report["z loss"][0].item() == pytest.approx((log_sum.square() * mask).sum().item(), rel=1e-6)
    for name, param in model.named_parameters():
        assert relative_error(grads[name], param.grad) < 1e-6, name


# With its norms and biases, whose gradients ranks sum, too.
BASELINE = [
    *TINY_BASELINE,
    "--loss-chunk-size",
    "16",
    "--transformer-impl",
    "local",
    "--qk-layernorm",
    "--add-qkv-bias",
]


@pytest.mark.parametrize(
    ("base", "mesh"), [(TINY, "--context-parallel-size 2"), (BASELINE, "--tensor-model-parallel-size 2")]
)
def test_the_log_has_both(base, mesh):
    """The loss that is reported stays the cross entropy, which another gradient then changes; on a mesh as alone."""
    flags, z_loss = ["--train-iters", "6"], ["--z-loss-coeff", "0.1"]
    plain, alone = train(1, *flags, base=base), train(1, *flags, *z_loss, base=base)
    assert alone.losses[1] == plain.losses[1] and alone.losses[6] != plain.losses[6]
    found = alone.of_term("z loss")
    assert {1, 6, -1} <= found.keys() and found[6] < found[1]
    of_mesh = train(2, *flags, *z_loss, *mesh.split(), base=base)
    for term in ("z loss", "lm loss"):
        assert of_mesh.of_term(term) == pytest.approx(alone.of_term(term), rel=2e-6)  # fp32, summed in another order


def test_megatrons_own_loss_has_none():
    with pytest.raises(ValueError, match=r"--z-loss-coeff 0\.0001 is of the loss in chunks: set --loss-chunk-size"):
        arguments.parse([*TINY_BASELINE, "--z-loss-coeff", "1e-4"])
