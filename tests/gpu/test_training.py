"""Whole runs of pretrain_yoco.py on one GPU: the losses of the CPU path, and models of real size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import SELF_DECODERS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--config configs/model/yoco_tiny.yaml --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 "
    "--micro-batch-size 4 --global-batch-size 8 --train-iters 10 --lr 1e-3 --log-interval 1 --eval-iters 0 --bf16 "
    "--use-distributed-optimizer"
)
# Mock data is easy, so losses fall fast; bf16 noise in the weights shows after the first steps.
LOSS_NOISE = 2e-2


def log_of(flags: str, gpus: int = 1, **env: str) -> str:
    """What `torchrun --nproc-per-node GPUS pretrain_yoco.py --verbose flags` prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    run = subprocess.run(
        [*command, "pretrain_yoco.py", "--verbose", *flags.split()],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    print(
        "\n".join(line for line in run.stdout.splitlines() if "elapsed time per iteration" in line or "memory" in line)
    )
    return run.stdout


def losses_in(log: str) -> list[float]:
    """The losses by iteration that a log tells."""
    return [float(value) for value in re.findall(r"lm loss: ([0-9.E+-]+) \|", log)]


def pretrain(flags: str, gpus: int = 1, **env: str) -> list[float]:
    """Losses by iteration of a run."""
    return losses_in(log_of(flags, gpus, **env))


@pytest.mark.parametrize("more", ["", "--optimizer muon", "--mtp-num-layers 1"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_losses_of_the_cpu_path(kind: str, more: str, tmp_path: Path) -> None:
    """A CPU checkpoint loads into Transformer Engine's layers, and both train alike from it."""
    if "muon" in more:
        pytest.importorskip("emerging_optimizers")
    flags = f"{TINY} --self-decoder {kind} {more}"
    cpu = dict(CUDA_VISIBLE_DEVICES="")
    pretrain(f"{flags} --save {tmp_path} --save-interval 1 --exit-interval 1", **cpu)
    resume = f"{flags} --load {tmp_path} --finetune"
    on_cpu, on_gpu = pretrain(resume, **cpu), pretrain(resume)
    assert len(on_cpu) == len(on_gpu) == 10
    assert on_cpu[-1] < on_cpu[0] - 0.1
    for step, (a, b) in enumerate(zip(on_cpu, on_gpu), start=1):
        assert abs(a - b) < LOSS_NOISE * a, f"step {step}: {a} on the CPU, {b} on the GPU"


# The graph is recorded in the fourth step, and the steps after it replay it: on other data, with other weights.
GRAPH = "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 3"
# megatron/core/full_cuda_graph.py:FullCudaGraphWrapper logs it once the graph is there, and from then on only replays.
RECORDED = "CUDA graph capture done for training"
LEAN = "--loss-chunk-size 2048 --recompute-elementwise"


@pytest.mark.parametrize("more", ["", LEAN, "--fp8-format hybrid --fp8-recipe delayed"], ids=["plain", "lean", "fp8"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_a_step_in_one_cuda_graph_trains_alike(kind: str, more: str) -> None:
    flags = f"{TINY} --self-decoder {kind} --no-check-for-nan-in-loss-and-grad {more}"
    log = log_of(f"{flags} {GRAPH}")
    before, recorded, _ = log.partition(RECORDED)
    assert recorded and len(losses_in(before)) == 3
    plain, graphed = pretrain(flags), losses_in(log)
    assert len(plain) == len(graphed) == 10
    assert plain[-1] < plain[0] - 0.1  # a graph that forgot the weights or the data would differ
    for step, (a, b) in enumerate(zip(plain, graphed), start=1):
        assert abs(a - b) < 5e-3 * a, f"step {step}: {a} without a graph, {b} with one"


def test_gradients_straight_into_the_buffer_train_alike() -> None:
    """Weights' gradients from Transformer Engine's layers, the loss and the embedding, against autograd's.

    Losses part by bf16's roundings of gradients, which the buffer does not have."""
    flags = f"{TINY} --untie-embeddings-and-output-weights"
    fused, plain = pretrain(flags), pretrain(f"{flags} --no-gradient-accumulation-fusion")
    assert len(fused) == len(plain) == 10 and fused[-1] < fused[0] - 0.1
    for step, (a, b) in enumerate(zip(fused, plain), start=1):
        assert abs(a - b) < LOSS_NOISE * b, f"step {step}: {a} fused, {b} not"


@pytest.mark.xdist_group("a whole GPU's memory")
@pytest.mark.parametrize("model", ["yoco_1.4b", "yoco_1.4b_swa"])
def test_trains_at_1_4b(model: str) -> None:
    losses = pretrain(
        f"--config configs/model/{model}.yaml configs/recipe/scaling.yaml --mock-data --tokenizer-type NullTokenizer "
        "--vocab-size 100000 --micro-batch-size 8 --global-batch-size 16 --exit-interval 12 --lr-warmup-iters 2 "
        "--lr 3e-4 --log-interval 2 --eval-iters 0"
    )
    assert len(losses) >= 5
    assert losses[-1] < losses[0] - 0.3, losses
