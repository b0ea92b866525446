"""Copies and loads the tokenizer files of a model, without running the model's code."""

import logging
import shutil
from pathlib import Path
from typing import Any

from yoco_megatron.convert.readers import Source
from yoco_megatron.data import carried_tokenizer
from yoco_megatron.data.tokenizer import template_ids, tokenizer_files, tokenizer_sha256

logger = logging.getLogger(__name__)

# Tokens before others that decide how these are spelt; more than a character has bytes.
CONTEXT = 8


def choose(source: Source, given: str | None) -> None:
    """Set the tokenizer of a source, and what its documents begin with: those of its run, or --tokenizer's, which wins.

    Raises:
        ValueError: a tokenizer that is not the run's, unless it is `given`.
    """
    if source.kind == "megatron":
        source.tokenizer = carried_tokenizer.of_run(source.folder, given)
        source.document_start = carried_tokenizer.recorded(source.folder).get("document_start")
    elif given is not None:
        own = tokenizer_sha256(str(source.tokenizer)) if source.tokenizer else None
        source.tokenizer = carried_tokenizer.named(given, own)


def load_of_run(folder: Path, given: str | None) -> Any:
    """The tokenizer of the run that has `folder` as its --save, or the `given` one; None if there is none.

    Raises:
        ValueError: a tokenizer that is not the run's, unless it is `given`.
    """
    path = carried_tokenizer.of_run(folder, given)
    return path and load(path, carried_tokenizer.recorded(folder).get("document_start"))


def load(folder: Path, start: list[int] | None = None) -> Any:
    """The Hugging Face tokenizer in `folder`, as training built it.

    Args:
        start: the special tokens that begin a text, whatever the tokenizer's template says; None: as it says.
    Raises:
        ValueError: no tokenizer can be loaded from there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the type of an exported model, which it does not know
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer raises its own types
        if not (folder / "tokenizer.json").exists():
            what = "it needs Python code of its own, which is not run here; name a folder with a tokenizer.json"
            what = what if "trust_remote_code" in str(error) else str(error)
            raise ValueError(f"--tokenizer {folder}: no tokenizer can be loaded from there: {what}") from None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    finally:
        logging.set_verbosity(before)
    if start is not None and start != template_ids(tokenizer)[0]:
        _set_start(tokenizer, start)
    return tokenizer


def _set_start(tokenizer: Any, start: list[int]) -> None:
    """Make the tokenizer's template begin texts with `start`; the end stays."""
    from tokenizers.processors import TemplateProcessing

    end = template_ids(tokenizer)[1]
    names = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in (*start, *end)}
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"documents begin with the ids {start} (data.json), and {type(tokenizer).__name__} always adds others"
        )
    if None in names.values():
        raise ValueError(f"documents begin with the ids {start} (data.json), which the tokenizer does not have")
    before, after = [names[id_] for id_ in start], [names[id_] for id_ in end]
    tokenizer.add_bos_token = False  # which would overwrite the template when the tokenizer is loaded again
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(name, id_) for id_, name in names.items()],
    )


def copy(source: Path, folder: Path, start: list[int] | None = None) -> Any:
    """Copy the files; returns the tokenizer loaded from the copy.

    Args:
        start: as in `load`. A copy whose template says something else is saved with one that says this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    tokenizer = load(folder)
    if start is not None and start != template_ids(tokenizer)[0]:
        logger.warning(
            "the tokenizer's template begins texts with %s, the data of the run began with %s: its copy does, too",
            *(template_ids(tokenizer)[0], start),
        )
        load(folder, start).save_pretrained(folder)
        tokenizer = load(folder)
        if template_ids(tokenizer)[0] != start:
            raise ValueError(f"--tokenizer {source}: its template cannot be made to begin texts with {start}")
    return tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text to be continued: with the template's beginning, without its end."""
    return [*template_ids(tokenizer)[0], *tokenizer(text, add_special_tokens=False)["input_ids"]]


def text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text that the ids `new` add to a text that ends with `before`: alone, many would lose a leading space."""
    context = before[-CONTEXT:]
    return tokenizer.decode([*context, *new])[len(tokenizer.decode(context)) :]


def rows(tokenizer: Any) -> int:
    """Rows of an embedding that has all ids of the tokenizer, some of which may be missing between others."""
    return max(tokenizer.get_vocab().values()) + 1
