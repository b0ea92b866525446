"""What a run leaves beside its checkpoints before its first step."""

from argparse import Namespace

import pytest

from yoco_megatron.startup import record


@pytest.mark.parametrize(("skip_train", "written"), [(False, {"config", "shape", "data", "tokenizer"}), (True, set())])
def test_an_evaluation_leaves_the_description_of_the_training(skip_train, written, monkeypatch):
    made = set()
    for name in ("summary", "get_tokenizer", "document_start"):
        monkeypatch.setattr(record, name, lambda *args: None)
    for name in ("packing", "repeated_validation"):
        monkeypatch.setattr(record, name, lambda args: [])
    monkeypatch.setattr(record, "save_resolved_config", lambda *args: made.add("config"))
    monkeypatch.setattr(record.architecture, "save", lambda *args: made.add("shape"))
    monkeypatch.setattr(record.fingerprint, "save", lambda *args: made.add("data"))
    monkeypatch.setattr(record.carried_tokenizer, "carry", lambda *args: made.add("tokenizer"))
    monkeypatch.setattr(record.carried_tokenizer, "template_of_data", lambda args: None)
    args = Namespace(rank=0, architecture="transformer", save="run", skip_train=skip_train)
    record.record_run(args, None)
    assert made == written
