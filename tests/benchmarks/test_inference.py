"""The inference benchmark goes on where it was cut off, keeps what it measured, and marks what it did not measure."""

import json
import sys

import inference
import pytest
import torch
from inference import Row

from yoco_megatron import runtime

LENGTHS = (256, 512)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script on a tiny model; returns its measurements, as it wrote them."""
    if runtime.has_gpu():
        pytest.skip("a run on the CPU")

    def call(*flags: str) -> list[dict]:
        command = [inference.__file__, "--model", "tiny", "--piece", "64", "--steps", "1", "--no-fuse"]
        command += ["--memory", "6e7", "--lengths", *map(str, LENGTHS), "--output", str(tmp_path / "results.jsonl")]
        command += ["--plot", str(tmp_path / "plot.svg"), "--rows", str(tmp_path / "rows.jsonl"), *flags]
        monkeypatch.setattr(sys, "argv", command)
        inference.main()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return call


def test_goes_on_where_it_was_cut_off(run, tmp_path, monkeypatch, capsys):
    measure, done = inference.measure, []

    def cut_off(model, row, options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((row.twin, row.length))
        return measure(model, row, options)

    monkeypatch.setattr(inference, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    recorded = (tmp_path / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["case"] for line in recorded} == {"tiny 256 bf16"}, "what has both models is recorded"
    assert "4 measurements" in capsys.readouterr().out
    done.clear()
    rows = run()
    assert done == [(True, 512)]
    assert [(row["twin"], row["length"]) for row in rows] == [(t, n) for t in (False, True) for n in LENGTHS]
    assert all(row["prefill"] > 0 and row["decode"] > 0 and row["memory"] > 0 for row in rows)
    recorded = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(recorded) == 2 * len(inference.METRICS) and all(row["ratio"] > 0 for row in recorded)
    assert all(row["command"].startswith("python benchmarks/inference.py ") for row in recorded), "no path of a machine"

    def no_model(*_):
        raise AssertionError("all is measured: no model is needed")

    (tmp_path / "plot.svg").unlink()
    monkeypatch.setattr(inference, "build", no_model)
    assert run() == rows and (tmp_path / "plot.svg").exists()


def test_other_device_or_flags_are_refused(run, tmp_path):
    row = Row("tiny", False, 256, "NVIDIA H100 80GB HBM3", "", memory=1.0, prefill=1.0)
    (tmp_path / "rows.jsonl").write_text(json.dumps(inference.asdict(row)) + "\n")
    with pytest.raises(SystemExit, match=r"with NVIDIA H100 80GB HBM3, .*; this is CPU, pieces of 64, .*not fused"):
        run()
    (tmp_path / "rows.jsonl").unlink()
    run("--lengths", "256")
    with pytest.raises(SystemExit, match=r"pieces of 64, .*; this is CPU, pieces of 128,"):
        run("--piece", "128")


def test_prefill_of_a_sample(run, monkeypatch):
    """Above its budget: three pieces, among them the first and the last."""
    sample, samples = inference.sample, {}

    def spy(length, *rest):
        samples[length] = sample(length, *rest)
        return samples[length]

    monkeypatch.setattr(inference, "sample", spy)
    rows = run("--prefill-seconds", "0")
    assert all(row["extrapolated"] == ["prefill"] and row["prefill"] > 0 for row in rows)
    assert samples == {256: [0, 2, 3], 512: [0, 4, 7]}


@pytest.mark.parametrize(("length", "count"), [(4096, 1), (4097, 2), (2**17, 32), (2**20, 256)])
def test_samples_reach_from_end_to_end(length, count):
    assert inference.sample(length, 4096, 1.0, 1.0) == list(range(count)), "within the budget: all"
    numbers = inference.sample(length, 4096, 8.0, 1.0)
    assert numbers == sorted(set(numbers)) and numbers[0] == 0 and numbers[-1] == count - 1
    assert len(numbers) == min(count, max(3, count // 8))
    times = [0.3 + 0.01 * i for i in range(count)]
    if count > 1:
        assert inference.of_line(numbers, [times[i] for i in numbers], count) == pytest.approx(sum(times))


def test_dry_run_measures_nothing(run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").touch()
    assert run("--dry-run") == []
    assert "4 measurements, about" in capsys.readouterr().out


def test_out_of_memory_is_a_row(run, monkeypatch, capsys):
    """The twin fits at no length: nothing is invented for it, what was measured stays."""
    prefill = inference.prefill

    def full(engine, length, numbers, device):
        if engine.cache.reserve and length in LENGTHS:
            raise torch.cuda.OutOfMemoryError
        return prefill(engine, length, numbers, device)

    monkeypatch.setattr(inference, "prefill", full)
    rows = run()
    assert all((row["memory"] != row["memory"]) == row["twin"] for row in rows)
    assert capsys.readouterr().out.count("tokens: out of memory") == 2


def test_extrapolation_is_exact_for_its_laws_and_marked():
    def row(n: int, fits: bool = True) -> Row:
        of_length = {"memory": 5e9 + 1e5 * n, "prefill": 2e-5 * n + 3e-10 * n * n} if fits else {}
        return Row("3b", True, n, "H100", "", **of_length)

    rows = [row(n, fits=n < 2**20) for n in inference.LENGTHS]
    *measured, last = inference.extrapolate(rows)
    assert measured == rows[:-1]
    assert last.memory == pytest.approx(row(2**20).memory) and last.prefill == pytest.approx(row(2**20).prefill)
    assert all(inference.starred(metric, last) for metric in ("memory", "prefill", "throughput"))
    assert not any(inference.starred(metric, measured[0]) for metric in inference.METRICS)


@pytest.mark.parametrize("twin", [False, True])
def test_prediction_counts_the_weights(twin):
    """Of the model that is built, to 1% (norms and decays are left out), and K,V by the token."""
    with torch.device("meta"):
        model = inference.build("tiny", twin, torch.device("meta"))
    weights = 2 * sum(p.numel() for p in model.parameters())
    memory = [inference.predict("tiny", twin, n)[0] for n in (0, 1000)]
    assert memory[0] == pytest.approx(weights, rel=0.01)
    layers = 4 if twin else 1
    assert memory[1] - memory[0] == 1000 * layers * 2 * 64 * 2  # K and V, 2 heads of 32, 2 bytes
