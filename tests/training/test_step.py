"""What the training step asks of a micro-batch."""

from types import SimpleNamespace

import pytest
import torch

from yoco_megatron.training import step
from yoco_megatron.training.micro_batches import MicroBatches


@pytest.mark.parametrize(("training", "size"), [(True, 4), (False, 2)])
def test_evaluation_has_a_micro_batch_of_its_own(training, size, monkeypatch):
    """Tensor-parallel ranks make room for what rank 0 sends: another size ends the run."""
    model = torch.nn.Linear(3, 3).train(training)
    model.vp_stage, model.forward = None, lambda *_, **__: None
    sizes = dict(architecture="transformer", teacher=None, micro_batch_size=4, eval_micro_batch_size=2)
    monkeypatch.setattr(step, "get_args", lambda: SimpleNamespace(**sizes))
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(step, "get_timers", lambda: lambda *_, **__: timer)
    asked = []
    parts = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "document_ids", "later_labels"))
    monkeypatch.setattr(step, "get_batch", lambda sample, runs, size, stage: asked.append(size) or parts)
    step.forward_step(MicroBatches(None), model)
    assert asked == [size]
