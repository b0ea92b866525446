"""The formats of records, and how each becomes documents: what is read, around which ids, by which encoders."""

from typing import Any

from megatron.core.datasets.indexed_dataset import DType

from yoco_megatron.corpus.chat_template import ChatTemplate
from yoco_megatron.corpus.conversations import Conversations, Prompts, SpecialTokens
from yoco_megatron.corpus.documents import DocumentEncoder, Ends, Records, Texts
from yoco_megatron.corpus.encoders import choose_encoder, following
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.data.tokenizer import id_limit, special_tokens

FORMATS = {Texts.kind: ["text"], Prompts.kind: ["prompt", "completion"], Conversations.kind: ["messages"]}
"""Format -> the keys of a record, where no others are given."""


def document_encoder(
    tokenizer: Any,
    keys: list[str],
    template: ChatTemplate | None,
    *,
    data_format: str = Texts.kind,
    append_eod: bool,
    backend: str,
    sentences: SentenceSplitter | None,
    split_special_tokens: bool,
) -> tuple[DocumentEncoder, str]:
    """The encoder of documents, and the library that encodes their texts; arguments as of `preprocess`.

    Raises:
        ValueError: flags that do not go together, or a tokenizer that lacks what they need.
    """
    is_text = data_format == Texts.kind
    if sentences is not None and not is_text:
        raise ValueError(f"--split-sentences is for plain texts: remove it, or --data-format {data_format}")
    special = special_tokens(tokenizer)
    chosen = choose_encoder(tokenizer, backend, split_special_tokens and is_text)
    encode = chosen.encode if sentences is None else sentences.encoder(chosen.encode)
    prefix, suffix = (chosen.prefix, list(chosen.suffix)) if template is None else ([], [])
    # Without its end a completion would teach a model never to stop; that of a turn is in the template.
    if (append_eod or data_format == Prompts.kind) and suffix[-1:] != [tokenizer.eod]:
        suffix.append(tokenizer.eod)
    records: Records = Texts(keys)
    if template is not None:
        records = Conversations(keys, template, SpecialTokens(special), split_special_tokens)
    elif not is_text:
        records = Prompts(keys, SpecialTokens(special) if split_special_tokens else None)
    limit = id_limit(tokenizer)
    ends = Ends(prefix, suffix, special)
    return DocumentEncoder(records, encode, following(encode), DType.optimal_dtype(limit), limit, ends), chosen.backend
