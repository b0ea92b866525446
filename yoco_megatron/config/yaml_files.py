"""YAML configs: Megatron's flag names as keys, merged left to right.

A config is a YAML mapping from flag names (dashes or underscores, without the leading --) to values: `true` sets a
switch, `false` or `null` leaves it at its default, a list gives a flag several values, and a mapping under data-path
blends datasets (prefix: weight). The key `include` names another config or a list of them, relative to the file, that
are merged first. Instead of a file, `key=value` may be given.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from yoco_megatron.utils.errors import nearest

INCLUDE = "include"


def load_config_files(sources: list[str]) -> dict[str, Any]:
    """Merge configs left to right.

    Args:
        sources: paths of YAML files, or `key=value` items.
    Returns:
        flag name with dashes -> value.
    Raises:
        ValueError: a file that is missing, not YAML, or not a mapping.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        if "=" in source and not Path(source).exists():
            merged |= _mapping(source.replace("=", ": ", 1), source)
        else:
            merged |= _load_file(Path(source))
    return merged


def _load_file(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in including:
        raise ValueError(f"--config {path}: the file includes itself")
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"--config {path}: cannot read it ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config {path}: not a text file; give the path of a YAML file") from None
    own = _mapping(text, str(path))
    merged: dict[str, Any] = {}
    included = own.pop(INCLUDE, [])
    for name in [included] if isinstance(included, str) else included:
        merged |= _load_file(path.parent / name, (*including, path.resolve()))
    return merged | own


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {where}: must be a mapping of flag names to values, for example 'num-layers: 26'")
    return {str(key).replace("_", "-"): value for key, value in content.items()}


def to_argv(config: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The command line that says what `config` says.

    Raises:
        ValueError: an unknown key (naming the nearest flag), or a value that is no true/false for a switch.
    """
    long_names = [name for name in parser._option_string_actions if name.startswith("--")]
    flags = {name.lstrip("-").replace("_", "-"): name for name in long_names}
    argv: list[str] = []
    for key, value in config.items():
        if key not in flags:
            raise ValueError(f"config key '{key}' is no flag of pretrain_yoco.py{nearest(key, flags)}")
        is_switch = parser._option_string_actions[flags[key]].nargs == 0
        if is_switch and not isinstance(value, bool) and value is not None:
            raise ValueError(f"config key '{key}' is a switch: its value is true or false, not {value!r}")
        if value is None or (value is False and is_switch):
            continue
        if is_switch:
            argv.append(flags[key])
        elif isinstance(value, dict):
            argv += [flags[key], *_blend(key, value)]
        elif isinstance(value, list):
            argv += [flags[key], *map(str, value)]
        else:
            argv.append(f"{flags[key]}={value}")  # one token, because argparse takes -1e-5 for a flag
    return argv


def _blend(key: str, sources: dict[Any, Any]) -> list[str]:
    """Megatron's 'W1 P1 W2 P2 ...' of a mapping from the prefix of a dataset to its weight."""
    if not key.endswith("data-path"):
        raise ValueError(f"config key '{key}': a mapping is for data-path (prefix: weight) alone")
    for prefix, weight in sources.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ValueError(f"config key '{key}': the weight of {prefix} must be a positive number, not {weight!r}")
    return [word for prefix, weight in sources.items() for word in (repr(weight), str(prefix))]
