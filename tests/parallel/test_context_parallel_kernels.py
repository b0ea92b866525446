"""Context parallelism of the fused retention mixer: its very kernels, in Triton's interpreter, against torch.

A process of its own, as in tests/ops/test_retention_kernels.py. float32, sums in another order: 2e-5.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import FULL_RECOMPUTE, relative_error
from support.pipeline import pipeline_step
from support.worlds import run_world

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
# name -> (ranks, packed documents, config)
CASES = {
    "one rank": (1, True, {}),
    "CP2": (2, False, {}),
    "CP2 documents": (2, True, {}),
    "CP4 documents recompute": (4, True, FULL_RECOMPUTE),
    "CP2 core recompute": (2, False, SELECTIVE),
}


def test_in_the_interpreter() -> None:
    if INTERPRETED:
        pytest.skip("this is the inner run")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert f"{len(CASES)} passed" in run.stdout, "the inner run lost cases"


if INTERPRETED:

    @pytest.mark.parametrize("case", CASES)
    def test_equals_one_process_in_torch(case: str) -> None:
        ranks, documents, overrides = CASES[case]
        small = dict(num_layers=4, self_decoder="gated_retention")
        reference = run_world(
            1, pipeline_step, small | dict(retention_backend="torch"), None, False, 1, False, documents
        )
        kernels = small | overrides | dict(retention_backend="triton")
        for result in run_world(ranks, pipeline_step, kernels, None, False, 1, False, documents, cp=ranks):
            for name, value in reference[0].items():
                error = relative_error(result[name], value)
                assert error < 2e-5, f"{name}: relative error {error:.1e}"
