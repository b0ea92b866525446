"""YAML configs: merged left to right and below the command line, with an error that names what is wrong."""

import errno
import os

import pytest

from yoco_megatron.config.yaml_files import load_config_files, to_argv
from yoco_megatron.startup.parser import build_parser
from yoco_megatron.utils.files import write_atomically


@pytest.fixture(scope="module")
def parser():
    return build_parser()


@pytest.fixture
def write(tmp_path):
    """Write a config file; its path as a user would give it."""

    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_merge_left_to_right(write):
    first = write("a.yaml", "num-layers: 4\nlr: 1.0e-3\nhidden-size: 64\n")
    second = write("b.yaml", "num_layers: 6\n")
    assert load_config_files([first, second]) == {"num-layers": 6, "lr": 1e-3, "hidden-size": 64}
    assert load_config_files([second, first])["num-layers"] == 4
    assert load_config_files([]) == {}


def test_dashes_and_underscores_are_one_key(write):
    assert load_config_files([write("a.yaml", "num_layers: 4\nhidden-size: 8\n")]) == {
        "num-layers": 4,
        "hidden-size": 8,
    }


def test_include_is_merged_first_and_relative_to_its_file(write):
    write("base/size.yaml", "num-layers: 4\nhidden-size: 64\n")
    write("base/batch.yaml", "hidden-size: 32\nmicro-batch-size: 2\n")
    run = write("run.yaml", "include: [base/size.yaml, base/batch.yaml]\nnum-layers: 8\n")
    assert load_config_files([run]) == {"num-layers": 8, "hidden-size": 32, "micro-batch-size": 2}
    one = write("one.yaml", "include: base/size.yaml\n")
    assert load_config_files([one]) == {"num-layers": 4, "hidden-size": 64}
    outer = write("outer/outer.yaml", "include: [../run.yaml]\nhidden-size: 16\n")
    assert load_config_files([outer])["hidden-size"] == 16


def test_file_that_includes_itself(write):
    write("b.yaml", "include: [a.yaml]\n")
    with pytest.raises(ValueError, match="includes itself"):
        load_config_files([write("a.yaml", "include: [b.yaml]\n")])


def test_key_value_items(write):
    path = write("a.yaml", "num-layers: 4\n")
    merged = load_config_files([path, "num_layers=6", "data-path=[0.3, a, 0.7, b]", "bf16=true", "split=90,5,5"])
    assert merged == {"num-layers": 6, "data-path": [0.3, "a", 0.7, "b"], "bf16": True, "split": "90,5,5"}


def test_a_file_whose_name_has_an_equals_sign(write):
    assert load_config_files([write("lr=1.yaml", "num-layers: 4\n")]) == {"num-layers": 4}


def test_empty_file(write):
    assert load_config_files([write("a.yaml", "# nothing yet\n")]) == {}


BROKEN = {
    "not YAML": "num-layers: [4\n",
    "a list": "- num-layers\n- 4\n",
    "text": "num-layers 4\n",
    "binary": b"\x80\x81\x82",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named(kind, write):
    path = write("broken.yaml", BROKEN[kind])
    with pytest.raises(ValueError, match=r"--config .*broken\.yaml") as caught:
        load_config_files([path])
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path, what in ((tmp_path / "missing.yaml", "is missing"), (tmp_path, "is no regular file")):
        with pytest.raises(ValueError, match=f"--config {path} {what}"):
            load_config_files([str(path)])


def test_of_two_names_of_one_flag_the_last_file_holds(write):
    config = write("samba.yaml", "self-decoder-pattern: MS\nnum-layers: 4\n")
    assert load_config_files([config, "self_decoder=sliding_window"])["self-decoder"] == "sliding_window"
    again = write("again.yaml", "include: samba.yaml\nself-decoder: gated_retention\n")
    assert load_config_files([again]) == {"self-decoder": "gated_retention", "num-layers": 4}
    both = write("both.yaml", "self-decoder: gated_retention\nself_decoder_pattern: MS\n")
    with pytest.raises(ValueError, match="are two names of one flag: use one of them"):
        load_config_files([both])


def test_a_zero_byte_is_refused(write):
    with pytest.raises(ValueError, match=r"a\.yaml: 'save' holds a zero byte"):
        load_config_files([write("a.yaml", 'save: "a\\0b"\n')])


def test_missing_include_is_named(write):
    with pytest.raises(ValueError, match=r"nowhere\.yaml is missing"):
        load_config_files([write("a.yaml", "include: [nowhere.yaml]\n")])


@pytest.mark.parametrize("value", ["5", "[5]", "{a: 1}", "2020-01-01"])
def test_an_include_that_is_no_path(write, value):
    with pytest.raises(ValueError, match=r"a\.yaml: include must name a file, or a list of files, not"):
        load_config_files([write("a.yaml", f"include: {value}\n")])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num-layer", "num-layers"),
        ("self-decoder-widow", "self-decoder-window"),
        ("micro-batchsize", "micro-batch-size"),
        ("scale-embedding", "no-scale-embedding"),
    ],
)
def test_unknown_key_names_the_nearest(key, meant, parser):
    with pytest.raises(ValueError, match=f"config key '{key}' is no flag of .*did you mean {meant}\\?"):
        to_argv({key: 4}, parser)


def test_unknown_key_like_no_other(parser):
    with pytest.raises(ValueError, match=r"config key 'zzqqxx' is no flag of pretrain_yoco\.py$"):
        to_argv({"zzqqxx": 4}, parser)


@pytest.mark.parametrize("value", ["yes please", 1, "true", [True]])
def test_switch_wants_true_or_false(value, parser):
    with pytest.raises(ValueError, match="'bf16' is a switch: its value is true or false"):
        to_argv({"bf16": value}, parser)


def parsed(parser, config: dict):
    return parser.parse_args(to_argv(config, parser))


def test_switches(parser):
    assert parsed(parser, {"bf16": True}).bf16
    assert not parsed(parser, {"bf16": False}).bf16
    assert not parsed(parser, {"bf16": None}).bf16
    assert parsed(parser, {}).scale_embedding and not parsed(parser, {"no-scale-embedding": True}).scale_embedding


def test_null_leaves_the_default(parser):
    assert parsed(parser, {"norm-epsilon": None}).layernorm_epsilon == 1e-5


@pytest.mark.parametrize(
    ("key", "value", "dest", "wanted"),
    [
        ("lr", "1e-3", "lr", 1e-3),  # YAML reads 1e-3 as text
        ("lr", 1e-05, "lr", 1e-5),
        ("activation-func-clamp-value", -1.5, "activation_func_clamp_value", -1.5),
        ("glu-linear-offset", -1e-5, "glu_linear_offset", -1e-5),
        ("glu-linear-offset", "-1e-5", "glu_linear_offset", -1e-5),
        ("num-self-decoder-layers", -1, "num_self_decoder_layers", -1),
        ("data-path", ["0.3", "a", 0.7, "b"], "data_path", ["0.3", "a", "0.7", "b"]),
        ("data-path", "one", "data_path", ["one"]),
        ("rampup-batch-size", [8, 8, 100], "rampup_batch_size", [8, 8, 100]),
        ("split", "90,5,5", "split", "90,5,5"),
        ("wandb-exp-name", "-dash", "wandb_exp_name", "-dash"),
    ],
)
def test_values_reach_the_parser(key, value, dest, wanted, parser):
    assert getattr(parsed(parser, {key: value}), dest) == wanted


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    """A rename would, and the device of /dev/null be gone."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for place in (pipe, folder):
        with pytest.raises(OSError, match="is no regular file: name another one"):
            write_atomically(place, "new")
    assert pipe.is_fifo() and folder.is_dir() and sorted(tmp_path.iterdir()) == [folder, pipe]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}
