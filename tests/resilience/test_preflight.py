"""Which nodes are unfit; without GPUs the same measurement runs on the CPU."""

import json

import pytest

from yoco_megatron.resilience import preflight


def gpu(index: int, used: str = "4", errors: str = "0") -> dict[str, str]:
    return {
        "index": str(index),
        "name": "H100",
        "memory.used": used,
        "memory.total": "81559",
        "ecc.errors.uncorrected.volatile.total": errors,
    }


def test_gpus():
    assert preflight.gpu_faults([gpu(0), gpu(1, errors="[N/A]")], 2, 2048) == []
    assert preflight.gpu_faults([gpu(0)], 2, 2048) == ["1 GPUs instead of 2"]
    assert "uncorrected memory errors" in preflight.gpu_faults([gpu(0, errors="3")], 1, 2048)[0]
    assert "in use by something else" in preflight.gpu_faults([gpu(0, used="40000")], 1, 2048)[0]


def test_speed():
    speeds = [{"tflops": 600, "allreduce_gbps": 400}, {"tflops": 300, "allreduce_gbps": 390}]
    assert preflight.speed_faults(speeds, 200, 100) == []
    assert preflight.speed_faults(speeds, 500, 100) == ["GPU 1 multiplies at 300 TFLOP/s, below 500"]
    assert preflight.speed_faults(speeds, 0, 395) == ["all-reduce in the node at 390 GB/s, below 395"]
    assert preflight.speed_faults(speeds[:1], 0, 999) == [], "one GPU reduces over nothing"


def test_disk_must_hold_one_more_checkpoint(tmp_path, monkeypatch):
    assert preflight.disk_faults(tmp_path, 0) == []
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda folder: 1 << 60)
    assert "a checkpoint needs" in preflight.disk_faults(tmp_path, 0)[0]


QUICK = ["--cpu", "--gpus", "2", "--seconds", "0.05", "--order", "32", "--min-free-gib", "0.001"]


def test_fit_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    run = tmp_path / "a run that does not exist yet"
    assert preflight.main([str(run), *QUICK]) == 0
    report = json.loads((run / "preflight/0/n7.json").read_text())
    assert len(report["speeds"]) == 2 and all(speed["tflops"] > 0 for speed in report["speeds"])
    assert not (run / "preflight/0/n7.bad").exists()


def test_slow_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert preflight.main([str(tmp_path), *QUICK, "--min-tflops", "1e6"]) == preflight.UNFIT
    assert (tmp_path / "preflight/0/n7.bad").read_text() == "n7\n"


def test_missing_gpus(tmp_path):
    if preflight.nvidia_smi():
        pytest.skip("there are GPUs here")
    assert preflight.main([str(tmp_path), "--gpus", "8", "--min-free-gib", "0"]) == preflight.UNFIT
