"""Muon updates each matrix by itself, whatever weight of Megatron's holds it, at every mesh.

Tolerance: Newton-Schulz in fp32 against float64, 1e-4 of the norm, as it makes small singular values large. Losses of
meshes: the fp32 sums of a step in another order, made larger by Newton-Schulz, 1e-4 after six steps; another split of
one kind of weight changes them by 1e-3 and more.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from support.cli import TINY, TINY_WINDOWS, Runs
from support.models import BF16, EXPERTS, build, relative_error, tiny_config
from support.upstream import restored
from torch import Tensor

from yoco_megatron.model.init import named_parameters
from yoco_megatron.upstream import matrix_optimizers, registry  # noqa: F401  # enters its entries

pytest.importorskip("emerging_optimizers")
LR = 0.5
ADAMS = ("word_embeddings.weight", "output_layer.weight", "linear_decay.weight", "router.weight")
# name -> (config, matrices of Muon: of two layers each of self- and cross-decoder, the shared K,V and four FFNs)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "windows": (dict(self_decoder="sliding_window", self_decoder_query_groups=2), 2 * 4 + 2 * 2 + 2 + 4 * 3),
    "retention, two sets of K,V, experts, bf16": (
        dict(shared_kv_sets=2, **EXPERTS, **BF16),
        2 * 5 + 2 * 2 + 4 + 4 * 3 * 5,
    ),
}


def first_update(grad: Tensor) -> Tensor:
    """Of a matrix, as published (kellerjordan.github.io/posts/muon), scaled as in arXiv 2502.16982, in float64."""
    x = grad.double() / grad.double().norm()
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
    return LR * max(x.shape) ** 0.5 * x


def matrices(name: str, weight: Tensor) -> list[Tensor]:
    """In a weight of `tiny_config`: self-decoder heads are 16 wide, those of the shared K,V 8."""
    if name.endswith("linear_qkv.weight"):
        q, k, v = weight.unflatten(0, (2, 4, 16)).split((2, 1, 1), dim=1)
        return [part.flatten(0, 2) for part in (q, k, v)]
    if name.endswith("linear_qkvg.weight"):
        return [part.flatten(0, 1) for part in weight.unflatten(0, (4, 4, 16)).unbind(1)]
    if name.endswith("linear_kv.weight"):
        return [part.flatten(0, 1) for part in weight.unflatten(0, (4, -1, 8)).unbind(1)]
    return list(weight.chunk(2)) if name.endswith("linear_fc1.weight") else [weight]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", MODELS)
def test_each_matrix_is_updated_by_itself_and_logits_by_adam(name: str, generator: torch.Generator) -> None:
    overrides, expected = MODELS[name]
    config = tiny_config(**overrides)
    built = build(config)
    names = dict(named_parameters(built))
    wrapped = Float16Module(config, built) if config.bf16 else built
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), wrapped)
    with restored():
        registry.install(False, None, only={"_get_param_groups"})
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="muon",
                muon_coefficient_type="simple",
                muon_fp32_matmul_prec="high",
                lr=LR,
                weight_decay=0.0,
                clip_grad=0.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
            ),
            [ddp],
        )
    main = {name: getattr(param, "main_param", param) for name, param in names.items()}
    before = {name: param.detach().clone() for name, param in main.items()}
    for param in names.values():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator))
    optimizer.step()
    of_muon = 0
    for name, param in names.items():
        moved, grad = before[name] - main[name].detach(), param.main_grad
        if param.dim() < 2 or name.endswith(ADAMS):
            assert relative_error(moved, LR * grad.sign()) < 1e-4, name
            continue
        for got, of in zip(matrices(name, moved), matrices(name, grad), strict=True):
            assert relative_error(got, first_update(of)) < 1e-4, name
            of_muon += 1
    assert of_muon == expected


FLAGS = ("--train-iters", "6", "--eval-iters", "0", "--optimizer", "muon", "--muon-fp32-matmul-prec", "high")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
MESHES = {
    "TP2 SP": TP2,
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "CP2": ("--context-parallel-size", "2"),
    "DP2": (),
}
DISTRIBUTED = ("--bf16", "--use-distributed-optimizer")


@pytest.mark.slow
def test_losses_of_every_mesh_and_resumes_at_others(tmp_path: Path) -> None:
    windows = (*TINY, *TINY_WINDOWS, *FLAGS)
    load = ("--load", str(tmp_path), "--ckpt-step", "3")
    saved = [*TINY, *FLAGS, *DISTRIBUTED, "--save", str(tmp_path), "--save-interval", "3"]
    two = Runs(
        2,
        {"saved": saved, "resumed": [*TINY, *FLAGS, *DISTRIBUTED, *load]}
        | {mesh: [*windows, *flags] for mesh, flags in MESHES.items()}
        | {"resumed, TP2 SP": [*TINY, *FLAGS, *DISTRIBUTED, *TP2, *load]}
        | {"blockwise": [*windows, *TP2, "--muon-tp-mode", "blockwise"]},
    )
    one = Runs(
        1,
        {
            "one process": windows,
            "unsplit": [*windows, "--muon-no-split-qkv"],
            "resumed": [*TINY, *FLAGS, "--bf16", *load],
            "another": [*TINY, *FLAGS[:4], "--bf16", *load],
        },
    )
    alone = one["one process"]
    for mesh in MESHES:
        assert two[mesh].loss(6) == pytest.approx(alone.loss(6), rel=1e-4), mesh
    for other in (two["blockwise"], one["unsplit"]):
        assert other.loss(6) != pytest.approx(alone.loss(6), rel=5e-4)
    last = {step: loss for step, loss in two["saved"].losses.items() if step > 3}
    assert len(last) == 3 and two["resumed"].losses == last, "bitwise, as printed"
    assert two["resumed"].grad_norms == {step: two["saved"].grad_norms[step] for step in last}
    for log in (two["resumed, TP2 SP"], one["resumed"]):
        assert list(log.losses) == [4, 5, 6] and log.loss(6) == pytest.approx(two["saved"].loss(6), rel=1e-3)
    with pytest.raises(AssertionError, match="was trained with --optimizer muon, whose state --optimizer adam cannot"):
        one["another"]


@pytest.mark.usefixtures("one_process")
def test_lion_has_its_own_betas() -> None:
    config = tiny_config()
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), build(config))
    flags = OptimizerConfig(optimizer="lion", lr=LR, lion_beta1=0.7, lion_beta2=0.6, params_dtype=torch.float32)
    with restored():
        registry.install(False, None, only={"_get_param_groups", "_default_adam_based_eopt_config_to_kwargs"})
        chain = get_megatron_optimizer(flags, [ddp])
    betas = {type(one.optimizer).__name__: one.optimizer.param_groups[0]["betas"] for one in chain.chained_optimizers}
    assert betas == {"Lion": (0.7, 0.6), "AdamW": (0.9, 0.999)}
