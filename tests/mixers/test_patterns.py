"""--self-decoder-pattern: a mixer for each layer, and what the rest of the system makes of it."""

import pytest
from support.cli import parsed, train
from support.exported import small_config

from yoco_megatron.config.yaml_files import to_argv
from yoco_megatron.convert.config_fields import sizes, to_fla, to_flags
from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.memory import cache_bytes, gpu_memory
from yoco_megatron.costs.optimizer import layer_matrices
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.costs.stage_time import part_seconds
from yoco_megatron.costs.traffic import received_bytes
from yoco_megatron.mixers import GATED_RETENTION, SLIDING_WINDOW, mixer_of_layer, mixers_in, options_of_others
from yoco_megatron.startup.parser import build_parser


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["RS"], "RS"),
        (["sliding_window", "gated_retention"], "SR"),
        (["R", "S"], "RS"),
        (["SS"], "sliding_window"),
        (["sliding_window", "sliding_window"], "sliding_window"),
        (["gated_retention"], "gated_retention"),
    ],
)
def test_letters_or_names(words: list[str], found: str) -> None:
    """Also from a file of flags, where the names are a list; the last of two flags holds."""
    args = parsed(1, "--self-decoder", "gated_retention", "--self-decoder-pattern", *words)
    assert ModelShape.from_args(args).self_decoder == found
    parser = build_parser()
    argv = to_argv({"self-decoder-pattern": words if len(words) > 1 else words[0]}, parser)
    assert parser.parse_args(argv).self_decoder == args.self_decoder


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["RSS"], "--self-decoder-pattern RSS has 3 letters, and the self-decoder 2 layers: write one letter for each"),
        (["SSS"], "--self-decoder-pattern SSS has 3 letters, and the self-decoder 2 layers"),  # of one mixer alone
        (["S"], "--self-decoder-pattern S has 1 letters, and the self-decoder 2 layers"),
        (["RQ"], "--self-decoder-pattern RQ: no mixer has the letter Q: R gated_retention, S sliding_window"),
        (["gated_retention", "windows"], "--self-decoder windows is unknown: use one of gated_retention, "),
        (["rs"], "--self-decoder rs is unknown: use one of gated_retention, "),
    ],
)
def test_what_is_no_pattern(words: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parsed(1, "--self-decoder-pattern", *words)


def test_options_of_each_mixer_are_read() -> None:
    parsed(1, "--self-decoder-pattern", "RS", "--self-decoder-window", "8", "--decay-temperature", "8")
    assert options_of_others("gated_retention") > options_of_others("RS")
    with pytest.raises(ValueError, match=r"--self-decoder-query-groups .* no effect with --self-decoder RR: "):
        parsed(1, "--self-decoder-pattern", "RR", "--self-decoder-query-groups", "1")


def test_mixers_of_layers() -> None:
    assert [mixer_of_layer("RSR", index) for index in range(3)] == [GATED_RETENTION, SLIDING_WINDOW, GATED_RETENTION]
    assert mixers_in("RSSS") == {GATED_RETENTION: 0.25, SLIDING_WINDOW: 0.75}
    assert mixers_in("sliding_window") == {SLIDING_WINDOW: 1.0}


def test_costs_are_the_mean_of_both() -> None:
    """Of a model half of whose layers have each mixer: of everything that is counted, halfway between the two."""
    both, one, other = (parsed(1, "--self-decoder-pattern", pattern) for pattern in ("RS", "RR", "SS"))
    counts = {
        "parameters": lambda args, shape: sum(parameter_count(shape).values()),
        "FLOPs": lambda args, shape: train_flops(shape, 1),
        "cache": lambda args, shape: cache_bytes(shape, 2)[1],
        "traffic": lambda args, shape: received_bytes(shape, 2)["self_decoder"],
        "seconds": lambda args, shape: part_seconds(shape)["self_decoder"],
        "memory": lambda args, shape: gpu_memory(args).total,
        "matrices": lambda args, shape: sum(layer_matrices(shape)["self_decoder"].values()),
    }
    for what, count in counts.items():
        found, *apart = (count(args, ModelShape.from_args(args)) for args in (both, one, other))
        assert apart[0] != apart[1], what
        assert found == pytest.approx(sum(apart) / 2, rel=1e-6), what


def test_trains_and_resumes_on_another_mesh(tmp_path) -> None:
    """To the rounding of sums in another order, over five steps of Adam."""
    flags = ["--self-decoder-pattern", "GM", "--train-iters", "10", "--save-interval", "5"]
    flags += ["--mamba-head-dim", "8", "--mamba-state-dim", "16", "--mamba-num-groups", "2"]
    whole = train(1, *flags, "--save", str(tmp_path))
    assert whole.loss(10) < whole.loss(1)
    flags += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    resumed = train(2, *flags, "--load", str(tmp_path), "--ckpt-step", "5")
    assert resumed.losses.keys() == set(range(6, 11))
    assert all(resumed.loss(step) == pytest.approx(whole.loss(step), rel=2e-5) for step in resumed.losses)


def test_exported_config() -> None:
    config = small_config("SR")
    assert config.layer_types == ["sliding_attention", "linear_attention", "full_attention", "full_attention"]
    assert to_flags(config)["self-decoder"] == "SR" and sizes(config).self_decoder == "SR"
    with pytest.raises(ValueError, match="--to fla: its YOCOForCausalLM has no second mixer of the self-decoder"):
        to_fla(small_config("RS"))
    for pattern, error in (("RSR", "3 letters for 2 layers"), ("RX", "'RX' is unknown"), ("", "'' is unknown")):
        with pytest.raises(ValueError, match=error):
            small_config(pattern)
