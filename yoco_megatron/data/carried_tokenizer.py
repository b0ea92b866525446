"""A run's tokenizer: copied beside its checkpoints when training starts, found again by the tools that read the run.

    SAVE/tokenizer/    the files that --tokenizer-model, --vocab-file and --merge-file name, and the chat template that
                       the data were made with, if it was given beside the tokenizer

The path in resolved_config.yaml may be gone when the run is read, or hold another tokenizer. data.json has the SHA-256.
"""

import logging
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, TypedDict

from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.data import fingerprint
from yoco_megatron.data.check import data_prefixes_from_args, read_report
from yoco_megatron.data.tokenizer import local_path, tokenizer_files, tokenizer_sha256
from yoco_megatron.utils import small_files

logger = logging.getLogger(__name__)

FOLDER = "tokenizer"
PATH_FLAGS = ("tokenizer-model", "vocab-file", "merge-file", "tokenizer-metadata")


class Recorded(TypedDict, total=False):
    """What data.json says of the tokenizer."""

    tokenizer_sha256: str | None
    document_start: list[int] | None


def absolute_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run, the paths of its tokenizer absolute; a name on the Hugging Face hub is none."""
    return {
        name: os.path.abspath(value) if name in PATH_FLAGS and value and os.path.exists(value) else value
        for name, value in flags.items()
    }


def carry(args: Namespace, save: str, template: str | None = None) -> None:
    """Copy the tokenizer into SAVE/tokenizer, unless it is there; another one that was there is renamed, not lost.

    Args:
        template: a chat template that wins over the tokenizer's; see `template_of_data`.
    Raises:
        OSError: no space, no permission.
    """
    target = Path(save) / FOLDER
    model = local_path(args.tokenizer_model)
    named = [model, *(Path(file) for file in (args.vocab_file, args.merge_file) if file)]
    files = [file for path in named if path is not None for file in tokenizer_files(path)]
    if args.trust_remote_code and model is not None and model.is_dir():
        files += model.glob("*.py")  # it cannot be loaded without; tools run it only when they are told to
    sources: dict[str, bytes] = {file.name: file.read_bytes() for file in files}
    if template is not None:
        sources["chat_template.jinja"] = template.encode()
    if not sources or (model is not None and target.exists() and target.samefile(model)):
        return
    if target.exists():
        same = {file.name for file in target.iterdir()} == sources.keys()
        if same and all(content == (target / name).read_bytes() for name, content in sources.items()):
            return
    aside = target.with_name(f".{FOLDER}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in sources.items():
        (aside / name).write_bytes(content)
    if target.exists():
        number = next(n for n in range(1, 1 << 20) if not target.with_name(f"{FOLDER}.{n}").exists())
        target.rename(target.with_name(f"{FOLDER}.{number}"))
    aside.rename(target)


def template_of_data(args: Namespace) -> str | None:
    """The chat template that tools/preprocess_data.py was given for all data that have one; None of several."""
    about = [read_report(prefix).get("tokenizer") or {} for prefix in data_prefixes_from_args(args)]
    found = {template for one in about if (template := one.get("options", {}).get("chat_template"))}
    return found.pop() if len(found) == 1 else None


def recorded(folder: Path) -> Recorded:
    """What the data.json of a run says; {} without one. Raises ValueError for a damaged file."""
    return small_files.read_json(folder / fingerprint.FILE_NAME, Recorded, missing={})


def of_run(folder: Path, given: str | None = None) -> Path | None:
    """The folder of the Hugging Face tokenizer of the run that has `folder` as its --save; None if none is there.

    Args:
        given: the value of --tokenizer, which wins; another tokenizer than the run's is told by a warning.
    Raises:
        ValueError: `given` is no folder, or what is there is not the tokenizer that the run was trained with.
    """
    expected = recorded(folder).get("tokenizer_sha256")
    if given is not None:
        return named(given, expected)
    flags = load_config_file(folder / RESOLVED)
    if flags.get("tokenizer-type") != "HuggingFaceTokenizer":
        return None
    carried, original = folder / FOLDER, Path(str(flags.get("tokenizer-model")))
    used = carried if carried.is_dir() else original
    if not used.is_dir():
        logger.warning("%s, the tokenizer of the run, is not there: name a folder with --tokenizer", original)
        return None
    found = tokenizer_sha256(str(used))
    if expected is not None and found != expected:
        raise ValueError(
            f"{used} (sha256 {str(found)[:12]}) is another tokenizer than that of the run (sha256 {expected[:12]}, see "
            f"{folder / fingerprint.FILE_NAME}): put that one back, or name one with --tokenizer"
        )
    if used is carried and original.is_dir() and (now := tokenizer_sha256(str(original))) != found:
        logger.warning(
            "%s (sha256 %.12s) is another tokenizer by now than that of the run (sha256 %.12s), whose copy %s is used",
            *(original, now, found, carried),
        )
    return used


def named(given: str, expected: str | None) -> Path:
    """The folder that --tokenizer names; a warning if its SHA-256 is not the expected one. Raises ValueError."""
    if not Path(given).is_dir():
        raise ValueError(f"--tokenizer {given}: no such folder")
    found = tokenizer_sha256(given)
    if expected is not None and found != expected:
        logger.warning(
            "--tokenizer %s (sha256 %.12s) is another tokenizer than the model's (sha256 %.12s)", given, found, expected
        )
    return Path(given)
