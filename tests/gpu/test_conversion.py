"""What Transformer Engine saved on a GPU, in FP8 too, converts to Hugging Face and back, and trains on from there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.test_training import ROOT, TINY, pretrain

from yoco_megatron import runtime
from yoco_megatron.convert.readers import TrainingTensors, checkpoint_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not runtime.has_transformer_engine(), reason="needs Transformer Engine"),
]
FP8 = "--fp8-format hybrid --fp8-recipe delayed"
PRECISIONS = {
    "bf16": "",
    "fp8": FP8,
    "fp8 weights": f"{FP8} --fp8-param-gather --overlap-grad-reduce --overlap-param-gather",
}


def convert(kind: str, source: Path, to: str, output: Path) -> None:
    """tools/convert_checkpoint.py, which compares logits before it succeeds."""
    command = [sys.executable, "tools/convert_checkpoint.py", "--from", kind, "--input", source, "--to", to]
    run = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    print(run.stdout.strip())


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_round_trip(precision: str, tmp_path: Path) -> None:
    """Bit for bit, and training starts again with the loss of the saved weights."""
    run, hf, back = (tmp_path / name for name in ("run", "hf", "back"))
    pretrain(f"{TINY} {precision} --save {run} --save-interval 3 --exit-interval 3")
    convert("megatron", run, "hf", hf)
    convert("hf", hf, "megatron", back)
    before, after = (TrainingTensors(checkpoint_folder(folder, None)) for folder in (run, back))
    assert before.found() == after.found() and len(before.found()) > 20
    for name in before.found():
        assert torch.equal(before.load(name), after.load(name)), name
    original, converted = (
        pretrain(f"{TINY} {precision} --load {folder} {flag} --exit-interval 2")
        for folder, flag in ((run, "--finetune"), (back, ""))
    )
    # With delayed scaling the saved run knows its scales, the converted one measures them anew.
    assert abs(converted[0] - original[0]) < (0.02 if precision else 1e-3) * original[0]
