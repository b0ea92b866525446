"""The benchmark of planned meshes without GPUs: its runs are stand-ins, its flags and plans are not."""

import argparse
import json
from pathlib import Path

import planned_meshes
import pytest
from runs import MOCK, Failure, Run

from yoco_megatron.costs.card import H100
from yoco_megatron.costs.memory import GIB
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.startup.arguments import parse_for_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def options_of(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(output=tmp_path / "rows.jsonl", flags="", timeout=1, device="4x H100", gpus=4)


def test_the_trainer_takes_the_flags_and_has_the_stages() -> None:
    for case in planned_meshes.CASES:
        for plan, words in planned_meshes.top(case, 4, H100):
            args, stages = parse_for_job([*MOCK.split(), *words.split(), "--exit-interval", "6"], 4)
            assert args.micro_batch_size == plan.args.micro_batch_size
            assert args.recompute_granularity == plan.args.recompute_granularity
            if plan.args.pipeline_model_parallel_size > 1:
                assert stages.count == len(plan.stages)


def test_the_largest_micro_batch_is_followed_by_one_that_does_not_fit() -> None:
    for case, gpus in planned_meshes.FITS:
        (largest, _), (next_one, _) = planned_meshes.largest(case, gpus, H100)[0]
        assert largest.fits and not next_one.fits
        assert next_one.args.micro_batch_size == largest.args.micro_batch_size + 1
        assert largest.recompute == next_one.recompute == "none"


def test_measured_beside_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each run a tenth slower than planned; the 13B's second micro-batch has no memory."""

    def attempt(name: str, words: str, gpus: int, timeout: int, verbose: bool) -> Run | Failure:
        args, _ = planned_meshes.flags.parse(words.split(), gpus)
        plan = Plan.of(args, H100)
        if not plan.fits:
            return Failure("CUDA out of memory")
        return Run(plan.time.seconds * 1.1, plan.memory.total / GIB, [1.0], "")

    monkeypatch.setattr(planned_meshes, "attempt", attempt)
    options = options_of(tmp_path)
    planned_meshes.ranking(planned_meshes.CASES[1], H100, options)
    planned_meshes.fit(H100, options)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    times = [row["ratio"] for row in rows if row["metric"] == "time a step"]
    assert len(times) == 6 and times == pytest.approx([1 / 1.1] * 6, abs=1e-3)
    printed = capsys.readouterr().out
    assert "-9.1%" in printed and "faster than with full recompute" in printed
    assert printed.count("did not") == 3 and "does not" in printed
