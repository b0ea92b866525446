"""Credentials are found by their form or by the name of their flag; folders, hashes and ids of tokens are none."""

import re
from pathlib import Path

import pytest
from support.cli import TINY

from yoco_megatron.resilience import exit_record, secrets
from yoco_megatron.startup import arguments
from yoco_megatron.startup.parser import build_parser

# Put together here, so that no scanner takes this file for a leak.
CREDENTIALS = [
    "hf_" + "NotARealToken" * 2,
    "sk-" + "notreal1" * 4,
    "sk-proj-" + "not_real-1" * 3,
    "ghp_" + "n0t" * 12,
    "github_pat_" + "n0t_real" * 4,
    "AKIA" + "IOSFODNN7EXAMPLE",
    "local-" + "0123456789" * 4,
    "eyJ" + "hbGciOiJI" + ".eyJzdWIiOiIx.sig",
    "s3://me:s3cret@bucket/data",
    "https://host/path?x=1&token=s3cret",
    "WANDB_API_KEY=s3cret",
    "ALL,HF_TOKEN=s3cret",
    "AWS_SECRET_ACCESS_KEY=s3cret",
    "Authorization: Basic dXNlcjpwYXNz",
    "PGPASSWORD=s3cret",
    "nvapi-" + "n0t_real" * 6,
    "gsk_" + "n0tReal" * 6,
    "dckr_pat_" + "n0t_real" * 3,
    "-----BEGIN RSA PRIVATE KEY-----",
]
HARMLESS = [
    "/data/hf_models_of_everything/text_document",
    "/models/snapshots/" + "0123456789abcdef" * 2,
    "/data/sk-learn-examples-for-everyone",
    "s3://bucket/data@v2",
    "https://host:8080/path",
    "design=abcdefgh",
    "/data/token=32000/text_document",
    "/data/npm_packagesAndOtherThings20",
    "/data/pypi-simple-index-of-2024-01-01-text",
    "token=32k",
    "tokenizer=abcdefgh",
    "0.5",
]


@pytest.mark.parametrize("value", CREDENTIALS)
def test_credentials_are_refused_and_hidden(value):
    for words in (["--app-tag-run-name", value], [f"--app-tag-run-name={value}"], ["--data-path", "1", value]):
        with pytest.raises(ValueError, match="holds a secret") as error:
            secrets.refuse(words)
        assert value not in str(error.value)
    with pytest.raises(ValueError, match="A holds a secret"):
        secrets.refuse([], {"A": value})
    hidden = secrets.redact(f"before {value} after")
    assert value not in hidden and "s3cret" not in hidden and hidden.startswith("before") and hidden.endswith("after")


@pytest.mark.parametrize("value", HARMLESS)
def test_what_is_no_credential_is_taken(value):
    secrets.refuse(["--data-path", value], {"name": value})


def test_flags_that_take_a_secret_are_known_by_name():
    for flag in ("--wandb-api-key", "--hub-token", "--db_password", "--client-secret", "--db-pass", "--aws-access-key"):
        with pytest.raises(ValueError, match=f"{flag} holds a secret"):
            secrets.refuse([flag, "x"])
        assert secrets.redact_command([flag, "x", "--lr", "1"]) == [flag, secrets.HIDDEN, "--lr", "1"]
        assert secrets.redact_command([f"{flag}=x"]) == [f"{flag}={secrets.HIDDEN}"]


def test_no_flag_of_training_is_one():
    """All of them take tokens of a vocabulary, or nothing secret."""
    flags = [flag for action in build_parser()._actions for flag in action.option_strings]
    assert len(flags) > 500 and not [flag for flag in flags if secrets.SECRET_FLAG.search(flag)]


def test_training_refuses_them_before_it_writes(tmp_path):
    """Also those of a config file; submit.py asks the same function."""
    (tmp_path / "run.yaml").write_text(f"data-cache-path: {CREDENTIALS[0]}\n")
    flags = [*TINY, "--run-folder", str(tmp_path / "run")]
    for more in (["--data-cache-path", CREDENTIALS[0]], ["--config", str(tmp_path / "run.yaml")]):
        for check in (arguments.parse_and_validate, lambda argv: arguments.parse_for_job(argv, 1)):
            with pytest.raises(ValueError, match="data-cache-path holds a secret"):
                check([*flags, *more])
    assert not (tmp_path / "run").exists()


def test_errors_are_recorded_without_them():
    """What argparse or a file system says of a value repeats it."""
    outcome = exit_record.of_exception(ValueError(f"unrecognized arguments: --x {CREDENTIALS[0]}"))
    assert outcome.reason == f"ValueError: unrecognized arguments: --x {secrets.HIDDEN}"
    main = (Path(__file__).parents[2] / "pretrain_yoco.py").read_text()
    assert re.search(r"print\(f\"pretrain_yoco.py: error: \{secrets.redact\(str\(error\)\)\}\"", main)
