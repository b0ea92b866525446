"""One step at every mesh equals one step of one process: loss, every gradient, every updated weight.

The meshes of this list are the parity list of docs/architecture.md; a new parallel mode adds its line here.
Tolerance: fp32 sums in another order, relative to each tensor's norm. Weights after Adam's first step move by lr times
the sign of the gradient, so tiny gradients of either sign make them the coarser figure.
"""

import pytest
import torch
from support.models import FULL_RECOMPUTE, SELF_DECODERS, STORED_ATTENTION, relative_error, train_step
from support.worlds import run_world

LOSS, GRAD, WEIGHT = 1e-6, 2e-5, 2e-3
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm", "mlp"])
QK_NORM = dict(qk_layernorm=True, add_qkv_bias=True)
Z_LOSS = dict(loss_chunk_size=17, z_loss_coeff=0.5)
MTP = dict(mtp_num_layers=1)
SOURCES = dict(shared_kv_sources=(1, 2))
UNITS = dict(num_layers=5, num_self_decoder_layers=2, cross_decoder_pattern="GAG")
# Another function, not another way to compute it.
OF_THE_MODEL = (*QK_NORM, *MTP, *SOURCES, *UNITS, "z_loss_coeff")

# name -> (processes, tensor parallel, distributed optimizer, config)
MESHES = {
    "TP2": (2, 2, False, {}),
    "TP2 SP": (2, 2, False, dict(sequence_parallel=True)),
    "TP4 SP": (4, 4, False, dict(sequence_parallel=True)),
    "DP2": (2, 1, False, {}),
    "DP2 distributed optimizer": (2, 1, True, {}),
    "TP2 SP DP2 distributed optimizer": (4, 2, True, dict(sequence_parallel=True)),
    "recompute full": (1, 1, False, FULL_RECOMPUTE),
    "recompute selective": (1, 1, False, SELECTIVE),
    "TP2 SP recompute full": (2, 2, False, dict(sequence_parallel=True, **FULL_RECOMPUTE)),
    "recompute all but attention": (1, 1, False, STORED_ATTENTION),
    "TP2 SP recompute all but attention": (2, 2, False, dict(sequence_parallel=True, **STORED_ATTENTION)),
    "recompute elementwise": (1, 1, False, dict(recompute_elementwise=True)),
    "TP2 SP recompute elementwise": (2, 2, False, dict(sequence_parallel=True, recompute_elementwise=True)),
    "loss in chunks": (1, 1, False, dict(loss_chunk_size=17)),
    "TP2 loss in chunks": (2, 2, False, dict(loss_chunk_size=17)),
    "TP4 SP loss in chunks": (4, 4, False, dict(loss_chunk_size=17, sequence_parallel=True)),
    "TP2 SP loss of all tokens at once": (2, 2, False, dict(loss_chunk_size=0, sequence_parallel=True)),
    "TP2 SP recompute selective": (2, 2, False, dict(sequence_parallel=True, **SELECTIVE)),
    "TP2 QK-norm and biases": (2, 2, False, QK_NORM),
    "TP2 SP QK-norm and biases, recompute full": (
        2,
        2,
        False,
        dict(sequence_parallel=True, **QK_NORM, **FULL_RECOMPUTE),
    ),
    "DP2 distributed optimizer, QK-norm and biases": (2, 1, True, QK_NORM),
    "TP2 SP z-loss": (2, 2, False, dict(sequence_parallel=True, **Z_LOSS)),
    "TP4 z-loss": (4, 4, False, Z_LOSS),
    "TP2 multi-token prediction, loss in chunks": (2, 2, False, MTP | dict(loss_chunk_size=17)),
    "TP2 SP multi-token prediction, recompute full": (
        2,
        2,
        False,
        dict(sequence_parallel=True, **MTP, **FULL_RECOMPUTE),
    ),
    "DP2 distributed optimizer, multi-token prediction": (2, 1, True, MTP),
    "recompute full, K,V of two sources": (1, 1, False, SOURCES | FULL_RECOMPUTE),
    "TP2 SP K,V of two sources": (2, 2, False, dict(sequence_parallel=True, **SOURCES)),
    "DP2 distributed optimizer, K,V of two sources": (2, 1, True, SOURCES),
}


@pytest.fixture(scope="module")
def one_process_step():
    """The reference for each model, computed once."""
    done: dict = {}

    def step(kind: str, tied: bool, **model: float) -> dict[str, torch.Tensor]:
        key = kind, tied, *model
        if key not in done:
            done[key] = run_world(1, train_step, dict(self_decoder=kind, **model), tied)[0]
        return done[key]

    return step


def compare(result: dict, reference: dict) -> None:
    assert result.keys() == reference.keys()
    for name, value in result.items():
        limit = {"grad": GRAD, "weig": WEIGHT}.get(name[:4], LOSS)
        error = relative_error(value, reference[name])
        assert error < limit, f"{name}: relative error {error:.1e} against one process"


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_process(mesh: str, kind: str, one_process_step) -> None:
    processes, tp, distributed_optimizer, overrides = EVERY_MESH[mesh]
    tied = tp == 1  # tied and untied heads both go through the list
    results = run_world(processes, train_step, dict(self_decoder=kind, **overrides), tied, distributed_optimizer, tp=tp)
    model = {name: overrides[name] for name in OF_THE_MODEL if name in overrides}
    for result in results:
        compare(result, one_process_step(kind, tied, **model))


# Other mixers, and a mixer for each layer, on meshes of each kind.
OTHERS = {
    "RS": ("TP2 SP recompute full", "DP2 distributed optimizer"),
    "gated_delta_net": (
        "TP2",
        "TP2 SP recompute elementwise",
        "TP2 SP recompute selective",
        "recompute full",
        "TP2 SP DP2 distributed optimizer",
    ),
    "MS": ("TP2 SP gated memory units, recompute full", "DP2 distributed optimizer, gated memory units"),
    "RG": ("TP2 SP gated memory units, recompute selective",),
    "mamba2": ("TP2", "TP4 SP", "TP2 SP recompute selective", "TP2 SP recompute elementwise"),
}

# Of self-decoders that have a memory.
UNIT_MESHES = {
    "TP2 SP gated memory units, recompute full": (
        2,
        2,
        False,
        dict(sequence_parallel=True, **UNITS, **FULL_RECOMPUTE),
    ),
    "TP2 SP gated memory units, recompute selective": (2, 2, False, dict(sequence_parallel=True, **UNITS, **SELECTIVE)),
    "DP2 distributed optimizer, gated memory units": (2, 1, True, UNITS),
}
EVERY_MESH = MESHES | UNIT_MESHES
assert UNIT_MESHES.keys() <= {mesh for meshes in OTHERS.values() for mesh in meshes}, (
    "one that is compared with nothing"
)


@pytest.mark.parametrize(("kind", "mesh"), [(kind, mesh) for kind, meshes in OTHERS.items() for mesh in meshes])
def test_other_mixers(mesh: str, kind: str, one_process_step) -> None:
    test_equals_one_process(mesh, kind, one_process_step)


def test_the_comparison_can_fail(one_process_step) -> None:
    """A step with another window is another step."""
    other = run_world(1, train_step, dict(self_decoder="sliding_window", self_decoder_window=6), True)[0]
    with pytest.raises(AssertionError, match="relative error"):
        compare(other, one_process_step("sliding_window", True))
