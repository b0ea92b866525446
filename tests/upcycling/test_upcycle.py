"""tools/upcycle.py from the command line: what it writes loads as an exported folder, and as a training checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from support.teachers import small_teacher
from support.tools import run, start
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from yoco_megatron.convert import tensor_names
from yoco_megatron.convert.readers import open_source
from yoco_megatron.evaluation.model_files import look

WINDOWS = ("--self-decoder", "sliding_window", "--self-decoder-window", "8", "--shared-kv-sets", "3")
RETENTION = ("--self-decoder", "gated_retention")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """In bf16, with a tokenizer that knows how to chat."""
    folder = tmp_path_factory.mktemp("teacher")
    small_teacher("llama").bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", "the", "fox"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def upcycle(teacher: Path, output: Path, *flags: str) -> str:
    return run("upcycle", "--teacher", teacher, "--output", output, *flags)


@pytest.mark.parametrize("mixer", [WINDOWS, RETENTION])
def test_exported_folder_and_checkpoint_are_the_same_model(mixer, teacher, tmp_path):
    sets = 3 if mixer is WINDOWS else 1
    table = upcycle(teacher, tmp_path / "hf", *mixer)
    assert table.startswith(f"{tmp_path / 'hf'}: logits of") and f"shared K,V, {sets} set" in table
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["shared_kv_sets"] == sets
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and model.config.self_decoder == mixer[1]
    assert model.generate(torch.tensor([[2, 3, 2]]), max_new_tokens=5, min_new_tokens=5).shape == (1, 8)
    chat = [{"role": "user", "content": "the fox"}]
    same = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat) for f in (teacher, tmp_path / "hf")]
    assert same[0] == same[1] and same[0]["input_ids"][-1] == model.config.eos_token_id == 1
    assert "not trained since" in (tmp_path / "hf" / "README.md").read_text()

    upcycle(teacher, tmp_path / "checkpoints", *mixer, "--to", "megatron")
    exported, trainable = (
        open_source("hf", str(tmp_path / "hf")),
        open_source("megatron", str(tmp_path / "checkpoints")),
    )
    names = tensor_names.shapes(exported.config)
    assert names == tensor_names.shapes(trainable.config) and len(names) > 50
    for name in names:
        assert torch.equal(exported.load(name), trainable.load(name)), name
    assert look(str(tmp_path / "checkpoints")).identity["iteration"] is None, "it can be evaluated"


def test_error_is_one_line(teacher, tmp_path):
    done = start("upcycle", "--teacher", teacher, "--output", tmp_path / "no", *RETENTION, "--shared-kv-sets", "2")
    assert done.returncode == 1 and not (tmp_path / "no").exists()
    assert done.stderr.splitlines()[-1].startswith("upcycle.py: error: --shared-kv-sets 2 does not divide the 3")
    assert "Traceback" not in done.stderr
