"""tools/plan.py calibrate with tiny sizes on two CPU processes; and what becomes a card's figure."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from yoco_megatron.calibration import calibrate, links
from yoco_megatron.costs.card import H100, Card
from yoco_megatron.planning.flags import parse

ROOT = Path(__file__).parents[2]


def test_two_processes_write_a_card(tmp_path):
    output = tmp_path / "card.yaml"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool = str(ROOT / "tools/plan.py")
    command = [*launcher, tool, "calibrate", "--trial", "--output", str(output), "--base", "h200"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    card = Card.of(str(output))
    base = Card.of("h200")
    measured = "linear_tflops attention_tflops mixing_tflops head_at_once_tflops optimizer_ps launch_ms node_gb_per_s"
    assert all(getattr(card, name) != getattr(base, name) for name in measured.split())
    assert card.network_gb_per_s == base.network_gb_per_s and "network, FP8, step" in card.source
    assert run.stdout.count("linear_tflops") == 1 and "node, 2 ranks" in run.stdout


def test_without_a_gpu_it_is_one_error(tmp_path):
    command = [sys.executable, "tools/plan.py", "calibrate", "--output", str(tmp_path / "card.yaml")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and not (tmp_path / "card.yaml").exists()
    assert run.stderr.splitlines()[-1].startswith("plan.py: error: calibrate measures GPUs, and there is none here")


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        calibrate.calibrate(tmp_path / "file" / "card.yaml", H100, trial=True)
    with pytest.raises(OSError, match="no regular file"):
        calibrate.calibrate(tmp_path, H100, trial=True)
    assert not dist.is_initialized() and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_slowest_counts_and_a_layer_is_right(monkeypatch):
    """Elementwise work is what is left of a layer: with the card's own seconds of a layer its figure comes back."""
    monkeypatch.chdir(ROOT)
    words = "--config configs/model/yoco_3b.yaml --num-layers 8 --vocab-size 1000 --bf16"
    args, _ = parse([*words.split(), "--micro-batch-size", "2", "--global-batch-size", "2"], 1)
    shape = calibrate.ModelShape.from_args(args)
    seconds = calibrate.part_seconds_of_run(shape, args, H100.rates(args))
    counts = {"self_decoder": 4, "cross_decoder": 4, "shared_kv": 1, "output_layer": 1}
    layer = 3 * sum(count * seconds[part] for part, count in counts.items()) / 8
    names = ("linear_tflops", "attention_tflops", "mixing_tflops", "head_in_chunks_tflops", "optimizer_ps", "launch_ms")
    own = {name: getattr(H100, name) for name in names} | {"gpu_ms": layer * 1e3}
    faster = own | {"linear_tflops": 800.0, "optimizer_ps": 1.0, "launch_ms": 1.0}
    rings = {"node": links.Ring(4, [(1 << 13, 1e-5), (1 << 28, 1e-3)])}
    card = calibrate._card([faster, own], rings, args, H100)
    assert (card.linear_tflops, card.optimizer_ps, card.launch_ms) == (690.0, 19.2, 3.3)
    assert card.elementwise_ps == pytest.approx(H100.elementwise_ps, rel=1e-3)
    assert card.node_gb_per_s == pytest.approx(2**28 * 0.75 / 1e-3 / 1e9, rel=1e-3)
    assert card.node_latency_us == 10.0
