"""Mixtures of experts at every mesh equal one process: loss, every gradient, every updated weight.

Tolerance: fp32 sums in another order, relative to each tensor's norm, as in test_parity.py. The mean of balancing
losses of single sequences is that of any batch; `aux_loss` is of a micro-batch, and so has lines without data
parallelism alone.
"""

import pytest
import torch
from support.models import EXPERTS, FULL_RECOMPUTE, SELF_DECODERS, STORED_ATTENTION, relative_error, train_step
from support.pipeline import pipeline_step
from support.worlds import run_world

LOSS, GRAD, WEIGHT = 1e-6, 2e-5, 2e-3
SP = dict(sequence_parallel=True)
ALLGATHER = dict(moe_token_dispatcher_type="allgather")
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
# What changes the model, not only how it is computed.
AUX = dict(moe_router_load_balancing_type="aux_loss")
BIAS = dict(
    moe_router_load_balancing_type="none",
    moe_aux_loss_coeff=0.0,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.1,
    moe_router_topk_scaling_factor=2.5,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_topk=1,
    moe_shared_expert_gate=True,
)
SOME_LAYERS = dict(moe_layer_freq=[0, 1, 1, 0])
LAST_LAYERS = dict(moe_layer_freq=[0, 0, 0, 0, 0, 0, 1, 1])

# name -> (processes, mesh, distributed optimizer, model, config)
MESHES = {
    "EP2": (2, dict(ep=2), False, {}, {}),
    "EP2 distributed optimizer": (2, dict(ep=2), True, {}, {}),
    "EP2 allgather": (2, dict(ep=2), False, {}, ALLGATHER),
    "EP4": (4, dict(ep=4), True, {}, {}),
    "EP2 DP2": (4, dict(ep=2), True, {}, {}),
    "TP2 SP": (2, dict(tp=2), False, AUX, SP),
    "TP2 SP ETP1": (2, dict(tp=2, etp=1), True, {}, SP),
    "TP2 SP EP2 ETP1": (2, dict(tp=2, ep=2, etp=1), True, AUX, SP),
    "TP2 SP EP2": (4, dict(tp=2, ep=2), True, {}, SP),
    "EP2 experts in some layers": (2, dict(ep=2), True, SOME_LAYERS, {}),
    "EP2 bias, groups, gate": (2, dict(ep=2), True, BIAS, {}),
    "recompute full": (1, {}, False, {}, FULL_RECOMPUTE),
    "EP2 recompute full": (2, dict(ep=2), False, {}, FULL_RECOMPUTE),
    "recompute all but attention": (1, {}, False, BIAS, STORED_ATTENTION),
    "TP2 SP EP2 recompute selective": (4, dict(tp=2, ep=2), True, {}, SP | SELECTIVE),
}
# name -> (layout of 8 layers, processes, mesh, model, config)
PP1 = "EttttttttL"
PIPELINES = {
    "PP2": ("Etttt|ttttL", 2, dict(pp=2), AUX, {}),
    "PP2, a stage without experts": ("Etttt|ttttL", 2, dict(pp=2), LAST_LAYERS, {}),
    "PP2 VP2 recompute full": ("Ett|tt|tt|ttL", 2, dict(pp=2, vp=2), {}, FULL_RECOMPUTE),
    "CP2": (PP1, 2, dict(cp=2), AUX, {}),
    "CP2 EP2": (PP1, 2, dict(cp=2, ep=2), {}, {}),
    "PP2 CP2 EP2": ("Ettt|tttttL", 4, dict(pp=2, cp=2, ep=2), {}, {}),
    "TP2 CP2 SP EP2": (PP1, 4, dict(tp=2, cp=2, ep=2), AUX, SP),
}


@pytest.fixture(scope="module")
def one_process():
    """The reference for each model, computed once."""
    done: dict = {}

    def step(function, model: dict, *args) -> dict[str, torch.Tensor]:
        key = function, repr(model), args
        if key not in done:
            done[key] = run_world(1, function, EXPERTS | model, *args)[0]
        return done[key]

    return step


def compare(result: dict, reference: dict) -> None:
    assert result.keys() == reference.keys()
    for name, value in result.items():
        limit = {"grad": GRAD, "weig": WEIGHT}.get(name[:4], LOSS)
        error = relative_error(value, reference[name])
        assert error < limit, f"{name}: relative error {error:.1e} against one process"


@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_process(mesh, one_process):
    processes, groups, distributed_optimizer, model, config = MESHES[mesh]
    model = {"self_decoder": SELF_DECODERS[processes % 2]} | model
    results = run_world(processes, train_step, EXPERTS | model | config, True, distributed_optimizer, **groups)
    for result in results:
        compare(result, one_process(train_step, model, True))


@pytest.mark.parametrize("mesh", PIPELINES)
def test_schedules_equal_one_process(mesh, one_process):
    """The balancing losses have the scale of the other ones in every schedule, and of every micro-batch."""
    layout, processes, groups, model, config = PIPELINES[mesh]
    results = run_world(processes, pipeline_step, EXPERTS | model | config, layout, **groups)
    reference = one_process(pipeline_step, model, None)
    assert set().union(*results) == reference.keys()
    for result in results:
        compare(result, {name: reference[name] for name in result})


def test_the_balancing_losses_are_in_the_comparison(one_process):
    """Without one of them it is another step."""
    for coefficient in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        without = run_world(1, train_step, EXPERTS | {coefficient: 0.0}, True)[0]
        name = "grad/decoder.layers.3.mlp.router.weight"
        assert relative_error(without[name], one_process(train_step, {}, True)[name]) > 1e-3
