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
from yoco_megatron.utils.small_files import BadFile, read_text

INCLUDE = "include"
ALIASES = {"self-decoder-pattern": "self-decoder"}
"""Names of flags that have two, so that of several files the last one holds."""
LIMIT = 1 << 20  # bytes of a config; YAML of that size takes some seconds


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
            merged |= _mapping(source.replace("=", ": ", 1), f"--config {source}")
        else:
            merged |= _load_file(Path(source))
    return merged


def load_config_file(path: Path) -> dict[str, Any]:
    """The mapping in one file, as it stands there: `include` is a key like any other.

    Raises:
        ValueError: a file that is missing, not YAML, or not a mapping of names to plain values.
    """
    return _mapping(read_text(path, LIMIT), str(path))


def _load_file(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in including:
        raise ValueError(f"--config {path}: the file includes itself")
    try:
        own = load_config_file(path)
    except BadFile as error:
        raise ValueError(f"--config {error}; give the path of a YAML file") from None
    merged: dict[str, Any] = {}
    included = own.pop(INCLUDE, [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"--config {path}: {INCLUDE} must name a file, or a list of files, not {included!r:.60}")
    for name in names:
        merged |= _load_file(path.parent / name, (*including, path.resolve()))
    return merged | own


class _Loader(yaml.SafeLoader):
    """No aliases, of which few lines make billions of values, and no key twice, of which the first would be lost."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases (& and *) are not supported: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError("a key occurs twice")
        return found


def parse_yaml(text: str) -> Any:
    """YAML as configs need it: plain values without aliases, tags of code, and keys that occur twice.

    Raises:
        ValueError: it is not that.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("not valid YAML: nested too deep") from None
    # A value that does not fit its tag (!!int x, !!timestamp 1) raises any of the others.
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        content = parse_yaml(text) or {}
    except ValueError as error:
        raise BadFile(f"{where}: {error}") from None
    if not isinstance(content, dict):
        raise BadFile(f"{where}: must be a mapping of flag names to values, for example 'num-layers: 26'")
    for key, value in content.items():
        values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not isinstance(key, str) or any(isinstance(one, list | dict | set | bytes) for one in values):
            raise BadFile(f"{where}: {str(key)[:80]!r} must have a plain value, a list of them, or a mapping to them")
        if any("\0" in str(one) for one in values):
            raise BadFile(f"{where}: {key[:80]!r} holds a zero byte, which no flag can")
    names = {key: key.replace("_", "-") for key in content}
    names = {key: ALIASES.get(name, name) for key, name in names.items()}
    for name in ALIASES.values():
        both = [key for key in names if names[key] == name]
        if len(both) > 1:
            raise BadFile(f"{where}: {' and '.join(both)} are two names of one flag: use one of them")
    return {names[key]: value for key, value in content.items()}


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
