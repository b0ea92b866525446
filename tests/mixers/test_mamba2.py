"""Sizes of Mamba-2: their defaults, and what does not fit is one error that names the flag or the field."""

import pytest
from support.cli import parsed
from support.exported import small_config

from yoco_megatron.costs.shape import ModelShape

FLAGS = ["--self-decoder", "mamba2", "--mamba-num-groups", "2"]


def test_heads_are_together_twice_as_wide_as_the_hidden_states() -> None:
    assert ModelShape.from_args(parsed(1, *FLAGS, "--mamba-head-dim", "8")).mamba_num_heads == 2 * 32 // 8
    assert ModelShape.from_args(parsed(1)).mamba_num_heads is None


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "--mamba-num-heads 1 is not a multiple of --mamba-num-groups 2: change one"),
        (["--mamba-head-dim", "7"], "--mamba-head-dim 7 does not divide twice --hidden-size 32"),
        (["--mamba-num-heads", "0"], "--mamba-num-heads 0 must be at least 1"),
        (["--mamba-num-heads", "6", "--mamba-state-dim", "0"], "--mamba-state-dim 0 must be at least 1"),
        (
            ["--mamba-num-heads", "6", "--mamba-num-groups", "1", "--tensor-model-parallel-size", "2"],
            "--mamba-num-groups 1 is not a multiple of --tensor-model-parallel-size 2",
        ),
    ],
)
def test_sizes_that_do_not_fit(flags: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parsed(4, *FLAGS, *flags)


def test_damaged_config() -> None:
    small_config("mamba2")
    with pytest.raises(ValueError, match="mamba_head_dim and mamba_num_groups missing"):
        small_config("SM", mamba_head_dim=None, mamba_num_groups=None)
    with pytest.raises(ValueError, match="mamba_num_groups 3 does not divide mamba_num_heads 4"):
        small_config("mamba2", mamba_num_groups=3)
    with pytest.raises(ValueError, match="mamba_state_dim 0 must be a whole number from 1"):
        small_config("mamba2", mamba_state_dim=0)
