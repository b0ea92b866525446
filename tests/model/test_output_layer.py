"""The chunked loss inside the models: where its weight's gradient goes, and under Megatron's own GPT."""

import pytest
import torch
from support.cli import TINY, TINY_BASELINE, train
from support.models import build, tiny_config, train_step

from yoco_megatron.model.layers.output_layer import ChunkedLossOutputLayer


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weight_gradient_straight_into_megatrons_buffer(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --gradient-accumulation-fusion: the same gradients and weights; tied, the embedding's part included."""
    plain = train_step(dict(loss_chunk_size=17), tied)
    real, buffers = ChunkedLossOutputLayer.forward, []

    def fused(self, hidden_states, weight, labels):
        buffers.append((self.weight if weight is None else weight).main_grad)
        self.fuse_weight_gradient = True
        return real(self, hidden_states, weight, labels)

    monkeypatch.setattr(ChunkedLossOutputLayer, "forward", fused)
    ours = train_step(dict(loss_chunk_size=17), tied)
    assert len(buffers) == 1
    for name, want in plain.items():
        torch.testing.assert_close(
            ours[name], want, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.usefixtures("one_process")
def test_it_shows_in_the_model() -> None:
    """And the parameter has the name that checkpoints know."""
    model = build(tiny_config(loss_chunk_size=17))
    assert "(output_layer): ChunkedLossOutputLayer" in repr(model)
    assert "output_layer.weight" in dict(model.named_parameters())
    assert "ChunkedLoss" not in repr(build(tiny_config(loss_chunk_size=0)))


@pytest.mark.parametrize("tying", [[], ["--untie-embeddings-and-output-weights"]], ids=["tied", "untied"])
def test_gpt_trains_alike_with_the_chunked_loss(tying: list[str]) -> None:
    flags = ["--exit-interval", "4", "--eval-iters", "0", *tying]
    plain, chunked = (train(1, *flags, "--loss-chunk-size", size, base=TINY_BASELINE) for size in ("0", "13"))
    assert len(plain.losses) >= 3
    for step, loss in plain.losses.items():
        assert chunked.loss(step) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("model", [TINY, TINY_BASELINE], ids=["yoco", "transformer"])
def test_waits_for_the_gathered_weight(model: list[str]) -> None:
    """The output layer's weight has a bucket of its own; nobody else would wait for it."""
    flags = ["--exit-interval", "4", "--eval-iters", "0", "--ddp-bucket-size", "1000"]
    flags += ["--untie-embeddings-and-output-weights", "--use-distributed-optimizer"]
    flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    plain, chunked = (train(2, *flags, "--loss-chunk-size", size, base=model) for size in ("0", "13"))
    assert len(plain.losses) >= 3
    for step, loss in plain.losses.items():
        assert chunked.loss(step) == pytest.approx(float(loss), rel=1e-5)
