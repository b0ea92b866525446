"""The validation losses of a run, beside its checkpoints, for those who read them without its log and curves.

SAVE/validation.json    iteration -> validation set ("" where there is one) -> {"loss": nats a token, ...}
"""

import math
import re
from pathlib import Path

from yoco_megatron.utils.files import write_json
from yoco_megatron.utils.small_files import read_json

FILE_NAME = "validation.json"
Numbers = dict[str, float]


def _read(save: Path) -> dict[int, dict[str, Numbers]]:
    found = read_json(save / FILE_NAME, dict[str, dict[str, Numbers]], missing={}, fix="remove it")
    return {int(one): numbers for one, numbers in found.items() if re.fullmatch(r"[0-9]{1,18}", one)}


def add(save: Path, iteration: int, name: str, numbers: Numbers) -> None:
    """Note what was found at an iteration; what an abandoned attempt noted after it goes. Raises OSError, BadFile.

    What is not finite is left out: JSON has no word for it, and an evaluation without a loss has nothing to say.
    """
    numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
    kept = {one: found for one, found in _read(save).items() if one <= iteration}
    if numbers:
        kept.setdefault(iteration, {})[name] = numbers
    write_json(save / FILE_NAME, kept)


def of_checkpoint(save: Path, iteration: int) -> tuple[int, dict[str, Numbers]] | None:
    """(iteration, numbers by set) of the last evaluation of a checkpoint or before it. Raises BadFile."""
    found = {one: numbers for one, numbers in _read(save).items() if one <= iteration}
    return max(found.items(), key=lambda item: item[0]) if found else None
