"""Uploads to a stand-in of the hub."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from yoco_megatron.convert.upload import NEEDED, upload


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict]]:
    """What the hub was asked to do."""
    made: list[tuple[str, dict]] = []
    for name in ("create_repo", "create_branch", "upload_folder"):
        note = lambda self, *args, _name=name, **options: made.append((_name, {"args": args, **options}))  # noqa: E731
        monkeypatch.setattr(HfApi, name, note)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*NEEDED, "model.safetensors"):
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_folder_in_one_commit(calls, folder):
    assert upload(folder, "me/model", revision="step-400") == "https://huggingface.co/me/model"
    (created, branch, sent) = calls
    assert created == ("create_repo", {"args": ("me/model",), "private": True, "exist_ok": True})
    assert branch[0] == "create_branch" and branch[1]["branch"] == "step-400"
    assert sent[1]["repo_id"] == "me/model" and sent[1]["folder_path"] == folder and sent[1]["revision"] == "step-400"
    calls.clear()
    upload(folder, "me/model", public=True)
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"] and calls[0][1]["private"] is False


def test_what_is_no_whole_model(calls, folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is no exported model: config\.json is missing"):
        upload(folder, "me/model")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing there"):
        upload(folder, "me/model")
    assert calls == []


class FromTheNetwork(Exception):
    """Neither OSError nor one of huggingface_hub's, as its HTTP client's own are."""


@pytest.mark.parametrize("kind", [OSError, FromTheNetwork])
def test_a_hub_that_refuses(folder, monkeypatch, kind):
    def refuse(self, *args, **options):
        raise kind("401\nunauthorized")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="--repo me/model: 401 unauthorized; log in"):
        upload(folder, "me/model")
