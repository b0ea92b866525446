"""--loss-suffix: the same training whether the cross-decoder is computed everywhere or where there is a loss."""

import pytest
from support.cli import train

from yoco_megatron.config.loss_suffix import suffix_length

FEW = ["--train-iters", "4", "--eval-interval", "4", "--loss-suffix", "0.3"]


def test_losses_are_those_of_all_positions() -> None:
    everywhere = train(1, *FEW, "--cross-decoder-positions", "all")
    there_alone = train(1, *FEW)
    assert "at the last 10 of 32 positions" in there_alone.text
    assert list(everywhere.losses) == [1, 2, 3, 4]
    for step, loss in everywhere.losses.items():  # printed with seven digits
        assert there_alone.loss(step) == pytest.approx(float(loss), rel=2e-6)
    for of_part, loss in everywhere.validation.items():
        assert float(there_alone.validation[of_part]) == pytest.approx(float(loss), rel=2e-6)


@pytest.mark.parametrize(
    ("flag", "length", "tokens"),
    [
        (None, 4096, None),
        ("4096", 131072, 4096),
        (16, 64, 16),
        ("0.25", 4096, 1024),
        ("1.0", 4096, None),
        ("4096", 4096, None),
        ("65536:0.25,262144:4096", 32768, None),
        ("65536:0.25,262144:4096", 131072, 32768),
        ("65536:0.25,262144:4096", 1048576, 4096),
    ],
)
def test_suffix_length(flag: str | int | None, length: int, tokens: int | None) -> None:
    assert suffix_length(flag, length) == tokens


@pytest.mark.parametrize(
    "flag", ["0", "-3", "5000", "0.0", "1.5", "nan", "inf", "x", "", "64:", ":4", "64:8,x:2", "1e3"]
)
def test_a_suffix_that_is_none(flag: str) -> None:
    with pytest.raises(ValueError, match="--loss-suffix"):
        suffix_length(flag, 4096)
