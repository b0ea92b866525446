"""A Hugging Face tokenizer as tasks see it: no template inside a text; what begins, ends and never continues one."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from yoco_megatron.evaluation.tokenizer import TextTokenizer


@pytest.mark.parametrize("adds_start", [True, False])
def test_text_and_special_tokens(adds_start: bool) -> None:
    letters = {
        letter: number for number, letter in enumerate(["<s>", "</s>", "<pad>", *pre_tokenizers.ByteLevel.alphabet()])
    }
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds_start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = TextTokenizer(whole)
    assert tokenizer.start == ((0,) if adds_start else ())
    assert (tokenizer.end, tokenizer.banned) == (1, {0, 2})
    ids = tokenizer.encode("two  spaces and ü ")
    assert len(ids) == len("two  spaces and ü ".encode()) and tokenizer.banned.isdisjoint(ids)
    assert tokenizer.decode([*ids, 1]) == "two  spaces and ü "


def test_the_end_is_not_banned() -> None:
    """GPT-2's documents begin with their end."""
    inner = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="a"))
    inner.post_processor = processors.TemplateProcessing(single="<e> $A", special_tokens=[("<e>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<e>", eos_token="<e>", pad_token="<e>")
    tokenizer = TextTokenizer(whole)
    assert (tokenizer.start, tokenizer.end, tokenizer.banned) == ((0,), 0, frozenset())


def test_no_space_is_cleaned_up() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, " .": 1}, unk_token="a"))
    inner.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=True)
    assert TextTokenizer(whole).decode([0, 1]) == "a ."
