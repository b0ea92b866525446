"""Whole runs of pretrain_yoco.py on 2, 4 or 8 GPUs: every mesh trains as one GPU does, and checkpoints change mesh.

bf16 with Transformer Engine, distributed optimizer with both overlaps, sequences long enough for the kernels of context
parallelism (chunks of 128 tokens). Tolerances, of the loss: the first step is one forward pass with equal weights,
5e-4; in the steps after it Adam has moved each weight by the sign of gradients that bf16 sums in another order, 2e-3.
(Four CPU processes in bf16: at most 6e-5; the other self-decoder: 2.5e-3, then up to 2.7e-2.) The step after a
checkpoint has equal weights again. Runs of a fixture share their processes; `-k goes_on` has five of them.
"""

from pathlib import Path

import pytest
import torch
from support.cli import Log, Runs
from support.models import SELF_DECODERS

from benchmarks.mesh import Mesh

GPUS = max(size for size in (2, 4, 8) if size <= max(2, torch.cuda.device_count()))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("all GPUs"),
    pytest.mark.timeout(560),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two, four or eight GPUs"),
]
MESHES = {
    2: ["TP2", "PP2", "DP2", "CP2", "PP2 VP2"],
    4: ["TP2xPP2", "TP2xPP2 VP2", "DP4", "TP2xDP2", "CP4", "TP2xCP2", "PP2xCP2"],
    8: ["TP2xPP2xDP2", "TP2xPP2xDP2 VP2", "DP8", "TP2xDP4", "CP8", "TP2xCP4", "TP2xPP4", "TP4xPP2", "TP2xPP2xCP2"],
}[GPUS]
SAVED, LOADED = MESHES[0], (f"CP{GPUS}", f"DP{GPUS}")
# Windows where they differ from retention: their halos, and what a stage sends.
CASES = [(mesh, "gated_retention") for mesh in MESHES] + [
    (mesh, "sliding_window") for mesh in (SAVED, LOADED[0], MESHES[-1])
]
CONTINUED = [(LOADED[0], "gated_retention"), (LOADED[1], "gated_retention"), (LOADED[0], "sliding_window")]
HALF, WHOLE = 4, 8
SAME_WEIGHTS, TRAINED = 5e-4, 2e-3
CONFIG = Path(__file__).resolve().parents[2] / "configs/model/yoco_tiny.yaml"
# Four heads of width 64, so that every size can be divided by four and every kernel takes them.
FLAGS = (
    f"--config {CONFIG} --hidden-size 256 --num-query-groups 4 --self-decoder-heads 4 "
    "--seq-length 2048 --max-position-embeddings 2048 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --bf16 "
    f"--micro-batch-size 1 --global-batch-size 8 --train-iters {WHOLE} --lr 1e-3 --log-interval 1 --eval-iters 0 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
)


# Experts, over all GPUs and beside tensor parallelism.
EXPERTS = (
    "--num-experts 8 --moe-ffn-hidden-size 256 --moe-shared-expert-intermediate-size 256 --moe-router-dtype fp32 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
)
ALL_DIVIDE = f"--expert-model-parallel-size {GPUS}"
EXPERT_MESHES = {
    "EP": (f"DP{GPUS}", ALL_DIVIDE),
    "TP2 EP ETP1": ("TP2" if GPUS == 2 else f"TP2xDP{GPUS // 2}", f"{ALL_DIVIDE} --expert-tensor-parallel-size 1"),
    MESHES[0]: (MESHES[0], ""),
}


def flags_of(mesh: str, kind: str, more: str = "") -> list[str]:
    window = "--self-decoder-window 300" if kind == "sliding_window" else ""
    return f"{FLAGS} --self-decoder {kind} {window} {Mesh.of(mesh).flags} {more}".split()


@pytest.fixture(scope="module")
def one_gpu() -> Runs:
    runs = {kind: flags_of("1", kind) for kind in SELF_DECODERS}
    return Runs(1, runs | {"experts": flags_of("1", "gated_retention", EXPERTS)})


@pytest.fixture(scope="module")
def all_gpus() -> Runs:
    return Runs(GPUS, {(mesh, kind): flags_of(mesh, kind) for mesh, kind in CASES}, timeout=420)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(mesh, self-decoder): SAVED from the first step on, the others from what it left in the middle."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in SELF_DECODERS}
    save = {kind: f"--save {folder} --save-interval {HALF}" for kind, folder in folders.items()}
    load = {kind: f"--load {folder} --ckpt-step {HALF}" for kind, folder in folders.items()}
    runs = {(SAVED, kind): flags_of(SAVED, kind, save[kind]) for kind in SELF_DECODERS}
    runs |= {(mesh, kind): flags_of(mesh, kind, load[kind]) for mesh, kind in CONTINUED}
    return Runs(GPUS, runs, timeout=240)


def assert_close(log: Log, reference: Log, first: int) -> None:
    """Losses from step `first` on, where the weights were equal."""
    assert list(log.grad_norms) == list(range(first, WHOLE + 1))
    errors = {step: abs(log.loss(step) / reference.loss(step) - 1) for step in log.losses if step in reference.losses}
    print({step: f"{error:.1e}" for step, error in errors.items()})
    assert len(errors) >= WHOLE - first  # the log leaves out a run's second step
    assert errors[first] < SAME_WEIGHTS
    assert max(errors.values()) < TRAINED


@pytest.mark.parametrize(("mesh", "kind"), CASES)
def test_trains_as_one_gpu_does(mesh: str, kind: str, one_gpu: Runs, all_gpus: Runs) -> None:
    reference = one_gpu[kind]
    assert reference.loss(WHOLE) < 0.95 * reference.loss(1), "it learns more than the tolerance"
    assert_close(all_gpus[mesh, kind], reference, 1)


@pytest.mark.parametrize(("mesh", "kind"), CONTINUED)
def test_goes_on_from_another_mesh(mesh: str, kind: str, changed: Runs) -> None:
    """Saved with tensor and pipeline parallelism, continued with neither: the losses of the run that went on."""
    assert_close(changed[mesh, kind], changed[SAVED, kind], HALF + 1)


@pytest.fixture(scope="module")
def with_experts() -> Runs:
    return Runs(
        GPUS,
        {name: flags_of(mesh, "gated_retention", f"{EXPERTS} {more}") for name, (mesh, more) in EXPERT_MESHES.items()},
    )


@pytest.mark.parametrize("mesh", EXPERT_MESHES)
def test_experts_train_as_on_one_gpu(mesh: str, one_gpu: Runs, with_experts: Runs) -> None:
    assert_close(with_experts[mesh], one_gpu["experts"], 1)


def test_the_comparison_can_fail(one_gpu: Runs) -> None:
    """Another self-decoder is another run."""
    with pytest.raises(AssertionError):
        assert_close(one_gpu["sliding_window"], one_gpu["gated_retention"], 1)
