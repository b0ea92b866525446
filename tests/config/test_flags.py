"""The table of flags against the parser, docs/flags.md, and what startup says of each flag that is refused."""

import re
from argparse import Namespace
from pathlib import Path

import megatron.training
import pytest
from support.cli import TINY, TINY_BASELINE

from yoco_megatron.config import flags
from yoco_megatron.mixers import MIXERS
from yoco_megatron.startup import arguments, checks
from yoco_megatron.startup.parser import build_parser

ROOT = Path(__file__).parents[2]
MEGATRON = Path(megatron.training.__file__).parents[1]
# Megatron's files that say which flags there are, and read them to say what contradicts what.
DECLARATIONS = ("training/arguments.py", "training/yaml_arguments.py")


@pytest.fixture(scope="module")
def parser():
    return build_parser()


@pytest.fixture(scope="module")
def tiny():
    return arguments.parse(TINY)


def given(tiny: Namespace, parser, flag: str, value: object = "other") -> Namespace:
    """TINY with one more flag, at no value of its own; checks of flags compare it with the default alone."""
    dest = parser._option_string_actions[f"--{flag}"].dest
    return Namespace(**vars(tiny) | {dest: value, "resolved_config": {flag.replace("_", "-"): value}})


def test_every_flag_has_one_place(parser):
    """Here a new flag of Megatron's fails: say in config/flags.yaml what it does."""
    wanted = [
        (group.title, action.option_strings[0].lstrip("-"))
        for group in parser._action_groups
        for action in group._group_actions
        if action.dest != "help"
    ]
    assert len(wanted) > 800
    assert sorted((entry.group, flag) for entry in flags.table() for flag in entry.flags) == sorted(wanted)


def test_the_page_is_made_from_it():
    assert (ROOT / "docs/flags.md").read_text() == flags.page(), "python -m yoco_megatron.config.flags > docs/flags.md"


def test_what_it_relies_on_exists(parser):
    """Flags and values in conditions, and the files that say how something is known."""
    for entry in flags.table():
        for need in entry.needs:
            name, *values = need.split()
            choices = parser._option_string_actions[f"--{name}"].choices
            assert {*values} <= {*(choices or values)}, need
        assert {*entry.where} <= flags.PLACES.keys()
        for named in re.findall(r"(?:tests|docs|configs|tools|launch|config)/[\w./]*\w|megatron/[\w./]*\w", entry.text):
            places = [ROOT / named, ROOT / "yoco_megatron" / named, MEGATRON.parent / named]
            assert any(place.exists() for place in places), f"{entry.flags[0]}: {named}"
        for name in re.findall(r"--([a-z][a-z0-9-]+)", f"{entry.text} {entry.instead}"):
            assert f"--{name}" in parser._option_string_actions, f"{entry.flags[0]}: --{name}"


def test_what_works_is_read(parser):
    """A flag of Megatron's that works is read somewhere beside its declaration."""
    ours = [ROOT / "pretrain_yoco.py", *(ROOT / "yoco_megatron").rglob("*.py")]
    files = [path for part in ("core", "training") for path in (MEGATRON / part).rglob("*.py")]
    text = "\n".join(path.read_text() for path in [*files, *ours] if not path.as_posix().endswith(DECLARATIONS))
    read = {*re.findall(r"(?:\.|['\"])([a-zA-Z_]\w+)\b", text)}
    declared = (MEGATRON / DECLARATIONS[0]).read_text()
    working = [flag for entry in flags.table() if entry.verdict == "works" for flag in entry.flags]
    dests = {flag: parser._option_string_actions[f"--{flag}"].dest for flag in working}
    unread = [
        flag
        for flag, dest in dests.items()
        if dest not in read
        and not dest.startswith("muon_")  # read by their common prefix
        and f"args.{dest}" not in declared  # turned into another flag
        and dest != "deprecated_use_mcore_models"
    ]
    assert unread == []


def test_each_flag_without_effect_is_refused_with_its_reason(tiny, parser):
    count = 0
    for entry in flags.table():
        for flag in entry.flags:
            args = given(tiny, parser, flag)
            if entry.verdict == "works" or "yoco" not in (entry.where or ["yoco"]):
                continue
            (said,) = flags.refusals(args, parser, "yoco")
            assert said.startswith(f"--{flag.replace('_', '-')} ") and entry.text in said and "\n" not in said
            count += 1
    assert count > 400


def test_a_default_is_no_flag(tiny, parser):
    """Given or not; and what an architecture takes is not refused there."""
    for entry in flags.table():
        for flag in entry.flags:
            default = parser.get_default(parser._option_string_actions[f"--{flag}"].dest)
            assert flags.refusals(given(tiny, parser, flag, default), parser, "yoco") == []
            if entry.verdict != "works" and "transformer" not in (entry.where or ["transformer"]):
                assert flags.refusals(given(tiny, parser, flag), parser, "transformer") == []


def test_an_option_of_what_is_not_in_use(tiny, parser):
    for entry in (entry for entry in flags.table() if entry.needs):
        for flag in entry.flags:
            args = given(tiny, parser, flag)
            for need in entry.needs:
                setattr(args, parser._option_string_actions[f"--{need.split()[0]}"].dest, None)
            (said,) = flags.refusals(args, parser, entry.where[0] if entry.where else "yoco")
            assert said.startswith(f"--{flag} has no effect without --{entry.needs[0]}")
            for need in entry.needs:
                name, *values = need.split()
                both = given(tiny, parser, flag, [entry.values[0]] if entry.values else "other")
                setattr(both, parser._option_string_actions[f"--{name}"].dest, values[0] if values else "set")
                assert flags.refusals(both, parser, "yoco") == [], f"--{flag} with --{need}"


def test_a_value_without_meaning(tiny, parser):
    for entry in (entry for entry in flags.table() if entry.values and not entry.needs):
        (flag,) = entry.flags
        for where in entry.where or ("yoco", "transformer"):
            (said,) = flags.refusals(given(tiny, parser, flag, "other"), parser, where)
            assert said.startswith(f"--{flag} other: {entry.instead} (use {entry.values[0]}")
            for value in entry.values:
                assert flags.refusals(given(tiny, parser, flag, value), parser, where) == []


def test_options_of_another_mixer(tiny, parser):
    for mixer in MIXERS.values():
        for option in mixer.options:
            flag = option.replace("_", "-")
            for chosen in MIXERS.values():
                args = given(tiny, parser, flag)
                args.self_decoder = chosen.name
                owners = " and ".join(other.name for other in MIXERS.values() if option in other.options)
                expected = f"--{flag} has no effect with --self-decoder {chosen.name}: it is an option of {owners}"
                args.retention_backend = "torch"
                said = flags.refusals(args, parser, "yoco")
                assert said == ([] if option in chosen.options else [expected])
            (said,) = flags.refusals(args, parser, "transformer")
            assert said == f"--{flag} has no effect on --architecture transformer: it has no self-decoder"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--sft", "--fim-data"], ["--sft has no effect: ", "; --fim-data has no effect: "]),
        (["--config", "openai-gelu=true"], ["--openai-gelu has no effect: "]),
        (["--init-method-std", "0.5"], ["--init-method-std has no effect without --init-law megatron"]),
        (["--self-decoder-window", "3"], ["--self-decoder-window has no effect with --self-decoder gated_retention"]),
        (["--offload-modules", "core_attn"], ["--offload-modules is refused on ", "use --recompute-granularity"]),
        (["--recompute-activations", "--recompute-modules", "mlp", "moe"], ["--recompute-modules moe: "]),
        (
            ["--validation-set-names", "a", "b"],
            ["--validation-set-names has no effect without --multiple-validation-sets"],
        ),
        (["--dataloader-type", "external"], ["--dataloader-type external: ", "use single or cyclic"]),
        (["--optimizer", "sgd", "--adam-beta1", "0.5"], ["--adam-beta1 has no effect without --optimizer adam"]),
        (
            ["--num-self-decoder-layers", "0", "--decay-temperature", "8"],
            ["--decay-temperature has no effect with --num-self-decoder-layers 0"],
        ),
        (["--exit-on-missing-checkpoint"], ["--exit-on-missing-checkpoint has no effect without --load or --pre"]),
        (["--keep-checkpoints", "2"], ["--keep-checkpoints has no effect without --save"]),
    ],
)
def test_a_command_line(given, named):
    """All that is wrong, in one line, before anything starts."""
    with pytest.raises(ValueError) as caught:
        arguments.parse([*TINY, *given])
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        ["--init-law", "megatron", "--init-method-std", "0.5"],
        ["--adam-beta1", "0.9"],
        ["--run-folder", "nowhere", "--keep-checkpoints", "2"],
        ["--retention-chunk-size", "16"],
    ],
)
def test_a_command_line_that_is_taken(more):
    arguments.parse([*TINY, *more])


def test_what_only_plain_torch_reads_past_is_found_on_the_machine():
    """A login node without Transformer Engine takes it: the machine that trains may have it."""
    args = arguments.parse([*TINY_BASELINE, "--transformer-impl", "local", "--qk-l2-norm"])
    with pytest.raises(ValueError, match="--qk-l2-norm has no effect"):
        checks.check_machine(args)


def test_an_earlier_runs_flags_are_read():
    """What had no effect then has none now."""
    arguments.parse([*TINY, "--self-decoder-window", "3", "--sft"], reading=True)
