"""Tokenizer flags: checking them, building the tokenizer with Megatron's own builder, and hashing its content.

Which tokenizer a `--tokenizer-type` means is decided in megatron.core.tokenizers alone. Training one:
yoco_megatron/corpus/tokenizer_training.py.
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, TypedDict

from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.small_files import BadFile, read_json, read_text

NEEDS_MODEL = frozenset({"HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"})
# What Megatron makes of these comes from the Hugging Face hub, also where a vocabulary and merges are given.
NAMES_ON_HUB = {
    "GPT2BPETokenizer": "gpt2",
    "BertWordPieceLowerCase": "bert-large-uncased",
    "BertWordPieceCase": "bert-large-cased",
}
# How long the hub may take to answer whether it has a name.
HUB_SECONDS = 5.0
# Files of Hugging Face tokenizers, and what is hashed of those without a tokenizer.json.
FILES = (
    *("tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens_map*", "chat_template*"),
    *("*.model", "*.tiktoken", "*.bpe", "*.spm"),
)
LARGEST = 512 << 20  # bytes of a tokenizer.json
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Megatron's own tokenizer flags (--tokenizer-type, --tokenizer-model, ...), the same as in pretraining."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")


def describe(args: Any) -> dict[str, Any]:
    """What a dataset's report says of the tokenizer flags: type, absolute path, SHA-256, and other `options` given."""
    from megatron.training.config import TokenizerConfig

    defaults = {field.name: field.default for field in dataclasses.fields(TokenizerConfig)}
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) != defaults[name]}
    model = args.tokenizer_model
    return {
        "type": args.tokenizer_type,
        "model": os.path.abspath(model) if model is not None and os.path.exists(model) else model,
        "sha256": tokenizer_sha256(model),
        "options": known_options(given),
    }


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of them that a report has: none that a model decides, and not --trust-remote-code, which a user says."""
    from megatron.training.config import TokenizerConfig

    names = {field.name for field in dataclasses.fields(TokenizerConfig)}
    names -= {"tokenizer_type", "tokenizer_model", "trust_remote_code", "padded_vocab_size", "pad_vocab_size"}
    return {name: value for name, value in options.items() if name in names}


def use_files_of_gpt2(args: Any) -> None:
    """GPT2BPETokenizer of --vocab-file and --merge-file, in place: a HuggingFaceTokenizer, in a folder of the cache.

    Megatron makes that tokenizer from the hub's gpt2, whatever files are given.

    Raises:
        ValueError: files that are missing, or a cache that cannot be written.
    """
    files = {"vocab.json": args.vocab_file, "merges.txt": args.merge_file}
    if args.tokenizer_type != "GPT2BPETokenizer" or not all(files.values()):
        return
    try:
        content = {name: read_text(Path(file), LARGEST) for name, file in files.items()}
        content["tokenizer_config.json"] = json.dumps({"tokenizer_class": "GPT2Tokenizer"})
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "yoco_megatron" / "tokenizers"
        folder = cache / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        for name, text in content.items():
            if not (folder / name).exists():
                write_atomically(folder / name, text)
    except BadFile as error:
        raise ValueError(f"--vocab-file, --merge-file: {error}") from None
    except OSError as error:
        raise ValueError(f"--tokenizer-type GPT2BPETokenizer: {error}; set XDG_CACHE_HOME to a folder for it") from None
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(folder)
    args.vocab_file = args.merge_file = None
    flags = getattr(args, "resolved_config", {})  # which those read who read the run
    for name in flags.keys() & {"vocab-file", "merge-file"}:
        del flags[name]
    flags |= {"tokenizer-type": args.tokenizer_type, "tokenizer-model": args.tokenizer_model}


def check_flags(args: Any) -> None:
    """Raises ValueError for flags that do not name a tokenizer, or one that is not to be had here."""
    if args.tokenizer_type is None:
        raise ValueError(
            "--tokenizer-type is missing; for a folder with a tokenizer.json it is HuggingFaceTokenizer, for mock data "
            "NullTokenizer"
        )
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ValueError("--vocab-size is missing: --tokenizer-type NullTokenizer has no vocabulary of its own")
    model = args.tokenizer_model
    if model is None and args.tokenizer_type in NEEDS_MODEL:
        raise ValueError(f"--tokenizer-model is missing: the file or folder of --tokenizer-type {args.tokenizer_type}")
    for flag in ("--vocab-file", "--merge-file", "--tokenizer-metadata"):
        file = getattr(args, {"--tokenizer-metadata": "metadata_path"}.get(flag, flag[2:].replace("-", "_")))
        if file is not None and not Path(file).is_file():
            raise ValueError(f"{flag} {file} does not exist")
    if args.tokenizer_type in NAMES_ON_HUB:
        _check_hub(NAMES_ON_HUB[args.tokenizer_type], f"--tokenizer-type {args.tokenizer_type}")
    elif model is not None and not Path(model).exists():
        folder, _, _ = model.rpartition("/")
        is_path = model.startswith((".", "/", "~")) or "/" in folder or (folder != "" and Path(folder).is_dir())
        if is_path or args.tokenizer_type != "HuggingFaceTokenizer":
            raise ValueError(f"--tokenizer-model {model} does not exist; give the file or folder of the tokenizer")
        _check_hub(model, f"--tokenizer-model {model}")


def _check_hub(name: str, flags: str) -> None:
    """Raises ValueError for a name that is neither in the cache of the Hugging Face hub nor, after seconds, on it."""
    if local_path(name) is not None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # each layer of the network raises its own types
        what = "no such file or folder here" if name in flags else f"it is made from {name!r} of the Hugging Face hub"
        raise ValueError(
            f"{flags}: {what}, and {name!r} is neither in the cache of the Hugging Face hub nor can it be had from "
            f"there ({' '.join(str(error).split())[:200]}). Give a folder: --tokenizer-type HuggingFaceTokenizer "
            "--tokenizer-model FOLDER, with its tokenizer.json and tokenizer_config.json; for a vocab.json and a "
            'merges.txt that is {"tokenizer_class": "GPT2Tokenizer"}'
        ) from None


def build_tokenizer(args: Any) -> Any:
    """Megatron's tokenizer for the flags `args` (a parsed namespace or a megatron.training TokenizerConfig).

    Raises:
        ValueError: no --tokenizer-type, or a tokenizer that cannot be loaded.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    check_flags(args)
    model = args.tokenizer_model
    args = copy.copy(args)
    args.pad_vocab_size = False  # the padded size depends on a model and its parallelism; data have neither
    try:
        return build(args)
    except Exception as error:  # each tokenizer library raises its own types
        raise ValueError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {model} cannot be loaded: {error}"
        ) from error


def id_limit(tokenizer: Any) -> int:
    """1 + the largest id of a tokenizer that Megatron built: more than its vocab_size where its ids have gaps."""
    library: Any = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    ids = library.get_vocab().values() if hasattr(library, "get_vocab") else []
    eod = getattr(tokenizer, "eod", None)  # NullTokenizer's may lie beyond its words
    return max(tokenizer.vocab_size, *(number + 1 for number in ids), -1 if eod is None else eod + 1)


def check_vocabulary(tokenizer: Any, args: Any) -> None:
    """Compare a tokenizer that Megatron built with the rows of the embedding, `args.padded_vocab_size`.

    Raises:
        ValueError: an id without a row, or a --vocab-size that Megatron would ignore.
    """
    size, rows = tokenizer.vocab_size, args.padded_vocab_size
    if args.vocab_size is not None and args.vocab_size != size:
        raise ValueError(
            f"--vocab-size {args.vocab_size}: the tokenizer has {size} ids, and --tokenizer-type {args.tokenizer_type} "
            "takes no other size: remove it, or ask for more rows with --make-vocab-size-divisible-by"
        )
    largest = id_limit(tokenizer) - 1
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has the id {largest}, the embedding {rows} rows: give --padded-vocab-size {largest + 1} or "
            "more, or another tokenizer"
        )


def hugging_face_wrapper(tokenizer: Any) -> Any:
    """Megatron's wrapper of a Hugging Face tokenizer, or None for one of another library."""
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    wrapper = getattr(tokenizer, "_tokenizer", None)
    return wrapper if isinstance(wrapper, HuggingFaceTokenizer) else None


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the tokens that mean something else than text: ends, beginnings, padding, roles.

    Without the unknown token, which stands for text; NullTokenizer, whose texts are ids, has its end of document.
    """
    from megatron.core.tokenizers.text import libraries

    hugging_face, wrapper = hugging_face_wrapper(tokenizer), getattr(tokenizer, "_tokenizer", None)
    found: dict[int, str] = {}
    if hugging_face is not None:
        inner = hugging_face.tokenizer
        found = {id_: token.content for id_, token in inner.added_tokens_decoder.items() if token.special}
        found |= dict(zip(inner.all_special_ids, inner.all_special_tokens))
        found.pop(inner.unk_token_id, None)
    elif isinstance(wrapper, libraries.TikTokenTokenizer):
        found = dict(enumerate(wrapper.special_tokens))
    elif isinstance(wrapper, libraries.SentencePieceTokenizer):
        pieces = wrapper.tokenizer
        found = {id_: pieces.id_to_piece(id_) for id_ in range(pieces.get_piece_size()) if pieces.is_control(id_)}
        found |= wrapper.id_to_special_token
    eod = getattr(tokenizer, "eod", None)
    return found if eod is None or eod in found else found | {eod: "the end of document"}


def template_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prefix, suffix): the ids that the template of a transformers tokenizer puts before and after every text.

    Raises:
        ValueError: a template that does something else.
    """
    bare: list[int] = []
    # A vocabulary of another script may have no "x".
    some = (tokenizer.decode([id_], skip_special_tokens=True) for id_ in range(min(len(tokenizer), 1000)))
    for text in itertools.chain(["x"], some):
        bare, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        if bare or not full:
            break
    if bare or full:
        raise ValueError(
            "--tokenizer-model: the tokenizer's template (post_processor) does more than to put tokens around a text; "
            "add --tokenizer-hf-no-include-special-tokens to do without it"
        )
    return [], []


def local_path(model: str | None) -> Path | None:
    """The file or folder of --tokenizer-model; of a name on the Hugging Face hub its folder in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model is None:
        return None
    if Path(model).exists():
        return Path(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(model, name)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def tokenizer_files(path: Path) -> list[Path]:
    """The file itself, or those of a tokenizer in a folder, which may hold a whole model; no code."""
    if path.is_file():
        return [path]
    return sorted({file for pattern in FILES for file in path.glob(pattern) if file.is_file() and file.suffix != ".py"})


def tokenizer_sha256(model: str | None) -> str | None:
    """SHA-256, in hex, of a tokenizer's content: a Hugging Face folder, or the one file of another library.

    It does not change when a tokenizer.json is saved again, by another version or with truncation. None if there is no
    such file here.
    """
    path = local_path(model)
    if path is None:
        return None
    if path.is_file():
        files = [path]
    else:
        files = [path / "tokenizer.json"]
        if not files[0].exists():
            files = [file for name in SLOW_FILES if (file := path / name).exists()] or tokenizer_files(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(_canonical(file) if file.name == "tokenizer.json" else file.read_bytes())
    return digest.hexdigest() if files else None


class _Model(TypedDict, total=False):
    merges: list[str | list[str]]


class _TokenizerJson(TypedDict, total=False):
    model: _Model


def _canonical(file: Path) -> bytes:
    """The content of a tokenizer.json in canonical form, without the padding and truncation of its last use."""
    content = read_json(file, _TokenizerJson, limit=LARGEST, fix="copy the tokenizer again")
    content |= {"padding": None, "truncation": None}
    model = content.get("model", {})
    if "merges" in model:  # older files: "a b"
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return json.dumps(content, sort_keys=True).encode()
