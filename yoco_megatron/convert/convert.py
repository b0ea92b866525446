"""Converts one format to another: read, write to a hidden folder, compare, and only then rename."""

import logging
import os
import shutil
from pathlib import Path

import yaml

from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.convert import tokenizer_files, verify, writers
from yoco_megatron.convert.readers import Source, open_source
from yoco_megatron.data.tokenizer import template_ids
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.files import write_atomically

logger = logging.getLogger(__name__)


def convert(
    kind: str,
    folder: str,
    to: str,
    output: str,
    *,
    iteration: int | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = 2 * 1024**3,
    card: dict[str, str] | None = None,
) -> str:
    """Convert the model in `folder` (format `kind`, of convert.SOURCES) to `output` (`to`, of TARGETS), and verify it.

    Args:
        tokenizer: folder of a tokenizer to ship instead of the source's own.
        shard_bytes: size limit of a safetensors file; one such shard and the largest tensors are in memory.
        card: license and language of the model card.
    Returns:
        a sentence about the comparison of the two models.
    Raises:
        ValueError: bad input, no disk space, or a result that differs; `output` is not made, the source is untouched.
    """
    require(
        (kind, to) != ("megatron", "megatron"),
        f"--from megatron --to megatron: nothing to convert, any mesh loads --input {folder} as it is",
    )
    check_output(output, shard_bytes)
    source = open_source(kind, folder, iteration)
    source.card = card or {}
    tokenizer_files.choose(source, tokenizer)
    return write(source, to, output, iteration=iteration, shard_bytes=shard_bytes)


def check_output(output: str, shard_bytes: int) -> None:
    """Raises ValueError for what `write` would refuse, before a source is opened."""
    require(shard_bytes > 0, f"--max-shard-size {shard_bytes / 1024**3:g} must be positive")
    final = Path(output)
    require(
        not final.exists() or (final.is_dir() and not any(final.iterdir())),
        f"--output {output} exists already: name a new folder",
    )


def write(source: Source, to: str, output: str, *, iteration: int | None = None, shard_bytes: int) -> str:
    """Write `source` to `output`, and compare the two; arguments, result and errors as those of `convert`."""
    check_output(output, shard_bytes)
    _check_tokenizer(source)
    final = Path(output)
    aside = final.parent / f".{final.name}.incomplete-{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        require(
            free > source.bytes * 1.01,
            f"--output {output}: {source.bytes / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free",
        )
        aside.mkdir()
        if to == "megatron":
            writers.write_megatron(source, aside)
        else:
            {"hf": writers.write_hf, "fla": writers.write_fla}[to](source, aside, shard_bytes)
        report = verify.compare(source, to, aside, iteration)
        if to == "megatron":
            _final_tokenizer_path(aside, final)
        if final.exists():
            final.rmdir()
        aside.rename(final)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _check_tokenizer(source: Source) -> None:
    """Raises ValueError for a tokenizer with more ids than the model has rows."""
    if source.tokenizer is None:
        logger.warning("no tokenizer folder is known: the result will have none (--tokenizer names one)")
        return
    tokenizer = tokenizer_files.load(source.tokenizer, source.document_start)
    size = tokenizer_files.rows(tokenizer)
    require(
        size <= source.config.vocab_size,
        f"--tokenizer {source.tokenizer} has ids up to {size - 1}, the model only {source.config.vocab_size} rows",
    )
    if template_ids(tokenizer)[1]:
        logger.warning(
            "the tokenizer's template ends texts: give transformers' generate prompts with add_special_tokens=False"
        )


def _final_tokenizer_path(aside: Path, final: Path) -> None:
    """Replace the path of the hidden folder in the config by that of the final one."""
    path = aside / RESOLVED
    flags = yaml.safe_load(path.read_text())
    if "tokenizer-model" in flags:
        flags["tokenizer-model"] = str(final / "tokenizer")
        write_atomically(path, yaml.safe_dump(flags, sort_keys=True))
