"""What a tool takes of the config in a checkpoint folder: the model and its tokenizer, nothing else."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.startup import load_run
from yoco_megatron.startup.load_run import parse_run
from yoco_megatron.startup.parser import build_parser

MODEL = {"num-layers": 4, "hidden-size": 64, "num-attention-heads": 2, "seq-length": 32, "self-decoder-heads": 4}
MODEL |= {"tokenizer-type": "NullTokenizer", "vocab-size": 100, "bf16": True, "no-scale-embedding": True}
MODELS = sorted((Path(__file__).parents[2] / "configs/model").glob("*.yaml"))


def write(folder: Path, more: dict) -> None:
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(MODEL | more))


def test_what_is_not_the_models_is_not_taken(tmp_path: Path) -> None:
    made = tmp_path / "made"
    places = ("run-folder", "save", "tensorboard-dir", "wandb-save-dir", "data-cache-path", "config-logger-dir")
    read = ("data-path", "load", "pretrained-checkpoint", "tokenizer-metadata", "te-precision-config-file", "include")
    switches = ("trust-remote-code", "use-checkpoint-args", "async-save", "profile")
    named = {"fp8-quantizer-factory": "os.system", "yaml-cfg": str(made), "ckpt-step": 7, "no-such-flag": 1}
    write(tmp_path, named | dict.fromkeys((*places, *read), str(made)) | dict.fromkeys(switches, True))
    args = parse_run(str(tmp_path))
    plain = tmp_path / "plain"
    plain.mkdir()
    write(plain, {})
    wanted = parse_run(str(plain))
    different = {name for name, value in vars(wanted).items() if getattr(args, name) != value}
    assert different <= {"load", "resolved_config"} and args.load == str(tmp_path)
    assert args.resolved_config | {"load": ""} == wanted.resolved_config | {"load": ""}
    assert not made.exists() and not args.trust_remote_code


def test_the_models_is_taken(tmp_path: Path) -> None:
    write(tmp_path, {"rope-variant": "standard", "untie-embeddings-and-output-weights": True, "rotary-base": 5000})
    args = parse_run(str(tmp_path))
    assert (args.num_layers, args.self_decoder_heads, args.scale_embedding, args.bf16) == (4, 4, False, True)
    assert (args.rope_variant, args.untie_embeddings_and_output_weights, args.rotary_base) == ("standard", True, 5000)


def test_every_taken_argument_is_one() -> None:
    dests = {action.dest for action in build_parser()._actions}
    assert {field.name for field in fields(YOCOFields)} <= load_run.TAKEN
    assert load_run.TAKEN - dests <= {"norm_epsilon", "layernorm_epsilon"}, "one of the two is Megatron's"


@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_all_of_our_models_is_taken(config: Path) -> None:
    options = build_parser()._option_string_actions
    keys = load_config_file(config).keys() - {"include"}
    assert {key for key in keys if options[f"--{key}"].dest not in load_run.TAKEN} == set()


@pytest.mark.parametrize("wrong", [{"num-layers": "many"}, {"num-layers": -2}, {"hidden-size": 65}, {"bf16": "yes"}])
def test_no_model_is_an_error_that_names_the_file(wrong: dict, tmp_path: Path) -> None:
    write(tmp_path, wrong)
    with pytest.raises(ValueError, match=r"resolved_config\.yaml"):
        parse_run(str(tmp_path))
