"""The files of a dataset: named, hashed, and moved into place so that an .idx exists only with all that it needs.

PREFIX.bin, PREFIX.idx                         token ids
PREFIX_loss_mask.bin, PREFIX_loss_mask.idx     uint8 for each token, of data with prompts: 1 is learned, 0 is not
PREFIX.json                                    the report
"""

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.data.loss_masks import mask_of
from yoco_megatron.data.token_sample import sample_tokens
from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.progress import progress

# Memory of one read when files are hashed.
BLOCK_BYTES = 1 << 22


def output_prefixes(output_prefix: str, names: list[str], overwrite: bool) -> dict[str, str]:
    """Name -> prefix of its dataset, as Megatron's own preprocessing names them.

    Raises:
        ValueError: such a dataset exists and `overwrite` is off.
    """
    prefixes = {name: f"{output_prefix}_{name}_document" for name in names}
    for prefix in prefixes.values():
        if not overwrite and Path(f"{prefix}.idx").exists():
            raise ValueError(f"--output-prefix: {prefix}.idx exists; choose another prefix, or pass --overwrite")
    return prefixes


def how_to_use(prefix: str, tokenizer: dict[str, Any]) -> str:
    """The flags that train on a dataset; `tokenizer` as its report has it."""
    flags = {
        "--data-path": prefix,
        "--tokenizer-type": tokenizer.get("type"),
        "--tokenizer-model": tokenizer.get("model"),
    }
    options = tokenizer.get("options", {})
    flags |= {f"--{name.replace('_', '-')}": value for name, value in options.items() if name != "chat_template"}
    words = [word for flag, value in flags.items() if value for word in _flag(flag, value)]
    return f"train on it with: {shlex.join(words)}"


def _flag(flag: str, value: Any) -> list[str]:
    return [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]


def describe_files(binary: Path, index: Path) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of a .bin and its .idx, by suffix, as reports hold them."""
    found: dict[str, dict[str, Any]] = {}
    for suffix, path in {"bin": binary, "idx": index}.items():
        found[suffix] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    found["bin"]["sampled_sha256"] = sample_tokens(binary, np.dtype(np.uint8)).sha256
    return found


def describe_mask(binary: Path, index: Path, learned: int, tokens: int) -> dict[str, Any]:
    """What a report says of the loss mask of `tokens` tokens, of which `learned` are learned."""
    files = describe_files(binary, index)
    return {"learned_tokens": learned, "learned_share": round(learned / tokens, 4), "files": files}


def move_into_place(
    binary: Path, index: Path, prefix: str, report: dict[str, Any], mask: tuple[Path, Path] | None = None
) -> None:
    """Move .bin, .json and last .idx into place; before the last one `mask`, the .bin and .idx of the loss mask."""
    old = [f"{mask_of(prefix)}.{suffix}" for suffix in ("idx", "bin")]
    if binary.exists():
        for file in (f"{prefix}.idx", *old):
            Path(file).unlink(missing_ok=True)
    moves = {binary: f"{prefix}.bin"} | (dict(zip(reversed(mask), old)) if mask else {})
    for source, target in moves.items():
        replace(source, target)
    write_atomically(Path(f"{prefix}.json"), json.dumps(report, indent=1) + "\n")
    replace(index, f"{prefix}.idx")
    descriptor = os.open(Path(prefix).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # makes the renames durable
    finally:
        os.close(descriptor)


def replace(source: Path, target: str) -> None:
    """Move, unless an earlier run moved it before it was killed."""
    if source.exists():
        os.replace(source, target)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        progress(total=size, desc=f"checksum {path.name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
