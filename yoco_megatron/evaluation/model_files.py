"""What is known of a model before it is loaded: its tokenizer, its longest sequence, and which one it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from yoco_megatron.checkpoint.layout import RELEASE, RESOLVED, path_of, tracked, tracked_iteration
from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.convert import tokenizer_files
from yoco_megatron.data import carried_tokenizer
from yoco_megatron.data.tokenizer import tokenizer_files as files_of_tokenizer
from yoco_megatron.data.tokenizer import tokenizer_sha256
from yoco_megatron.evaluation.tokenizer import TextTokenizer
from yoco_megatron.utils import files
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_json


class _Config(TypedDict):
    max_position_embeddings: int


@dataclass(frozen=True)
class ModelFiles:
    """max_length: tokens of the longest sequence. identity: JSON-able; equal for equal files alone."""

    tokenizer: TextTokenizer
    max_length: int
    identity: dict[str, Any]


def look(folder: str, iteration: int | None = None, tokenizer: str | None = None) -> ModelFiles:
    """Of a run's --save, or of an exported folder.

    Args:
        iteration: which checkpoint of a run; the latest by default.
        tokenizer: folder of one to use instead of the model's own.
    Raises:
        ValueError: no model there, or no tokenizer.
    """
    path = Path(folder)
    require(path.is_dir(), f"{folder}: no such folder")
    if (path / "config.json").exists():
        require(iteration is None, f"--iteration {iteration}: {folder} is an exported model, which has no iterations")
        max_length = read_json(path / "config.json", _Config)["max_position_embeddings"]
        found = path if files_of_tokenizer(path) else None
        if tokenizer is not None:
            found = carried_tokenizer.named(tokenizer, tokenizer_sha256(str(found)) if found else None)
        start, weights = None, path
    else:
        require(
            (path / RESOLVED).exists(),
            f"{folder} holds neither a run's checkpoints ({RESOLVED} is missing) nor an exported model (config.json): "
            "give the folder that training had as --save",
        )
        flags = load_config_file(path / RESOLVED)
        max_length = int(flags.get("max-position-embeddings") or flags.get("seq-length") or 0)
        found = carried_tokenizer.of_run(path, tokenizer)
        start = carried_tokenizer.recorded(path).get("document_start")
        is_release = iteration is None and tracked(path) == RELEASE  # of weights alone
        iteration = tracked_iteration(path) if iteration is None else iteration
        require(is_release or iteration is not None, f"{folder} holds no checkpoint: the run has not saved yet")
        weights = path / RELEASE if iteration is None else path_of(path, iteration)
        require(weights.is_dir(), f"--iteration {iteration}: {weights} is no folder")
    text = TextTokenizer.of_model(folder, found and tokenizer_files.load(found, start))
    identity = {
        "folder": str(path.resolve()),
        "iteration": iteration,
        "files": files.identity(filter(Path.is_file, weights.iterdir())),
    }
    return ModelFiles(text, max_length, identity | {"tokenizer": str(Path(tokenizer).resolve()) if tokenizer else None})
