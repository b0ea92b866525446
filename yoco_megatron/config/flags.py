"""The table of all flags, `flags.yaml`: what each one does, and the refusal of those that would do nothing.

`python -m yoco_megatron.config.flags` prints docs/flags.md.
"""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yoco_megatron.mixers import MIXERS, options_of_others

PLACES = {
    "yoco": "--architecture yoco",
    "transformer": "--architecture transformer",
    "torch": "layers of plain torch",
    "cpu": "a machine without a GPU",
}
VERDICTS = ("works", "no effect", "refused")
HEAD = """\
# Flags: what works, what has no effect, what is refused

Every flag of `pretrain_yoco.py --help`, by group: Megatron's under Megatron's names, and ours in **YOCO** and
**resilience** at the end. A flag that would do nothing is refused before anything starts, for the reason given here.
So is a flag that only works together with others which are not set (*with*). A flag that is set to its default is never
refused. Neither are flags that only matter on a larger mesh (`--sequence-parallel`, `--fp32-kv-transport`, overlaps),
so that one command line serves every mesh.

The baseline, `--architecture transformer`, is Megatron's GPT. It takes what is refused on `yoco` only, as Megatron
does; this is not tested. Layers of plain torch are `--transformer-impl local`, of either architecture.

Made by `python -m yoco_megatron.config.flags` from `yoco_megatron/config/flags.yaml`: do not edit."""


@dataclass(frozen=True)
class Entry:
    """One thing that is said of several flags; flags.yaml has the meaning of the fields."""

    group: str
    verdict: str
    text: str
    flags: tuple[str, ...]
    where: tuple[str, ...]
    needs: tuple[str, ...]
    values: tuple[str, ...]
    instead: str


@functools.cache
def table() -> tuple[Entry, ...]:
    """All entries of flags.yaml."""
    groups = yaml.load(
        Path(__file__).with_name("flags.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return tuple(_entry(group, said) for group, entries in groups.items() for said in entries)


def _entry(group: str, said: dict[str, Any]) -> Entry:
    (verdict,) = set(VERDICTS) & said.keys()
    needs = said.get("with", [])
    return Entry(
        group,
        verdict,
        said[verdict],
        tuple(said["flags"].split()),
        tuple(said.get("where", "").split()),
        (needs,) if isinstance(needs, str) else tuple(needs),
        tuple(said.get("values", "").split()),
        said.get("instead", ""),
    )


@functools.cache
def _entries() -> dict[str, Entry]:
    """By flag."""
    return {flag: entry for entry in table() for flag in entry.flags}


def refusals(args: Namespace, parser: ArgumentParser, where: str, alone: Collection[str] = ()) -> list[str]:
    """What is to be said of the flags that were given and would do nothing here: a sentence each.

    Args:
        args: parsed by `parser`, with `resolved_config`, which names what was given. A default is not refused.
        where: yoco or transformer, for all that this architecture refuses; torch and cpu, for what these alone refuse.
        alone: destinations of flags that need no others here.
    """
    actions = {name.lstrip("-").replace("_", "-"): action for name, action in parser._option_string_actions.items()}
    said = []
    for name in args.resolved_config:
        action = actions[name]
        value = getattr(args, action.dest)
        entry = _entries().get(action.option_strings[0].lstrip("-"))  # None: a flag that a program of one's own adds
        if entry is None or value == parser.get_default(action.dest):
            continue
        reason = _of_another_mixer(action.dest, where, args) or _reason(
            entry, where, value, args, {} if action.dest in alone else actions
        )
        if reason:
            said.append(f"--{name} {reason}")
    return said


def _of_another_mixer(dest: str, where: str, args: Namespace) -> str:
    """Why an option of a mixer that is not in use is refused; empty for all other flags."""
    owners = [mixer.name for mixer in MIXERS.values() if dest in mixer.options]
    if owners and where == "transformer":
        return "has no effect on --architecture transformer: it has no self-decoder"
    if owners and where == "yoco" and args.num_self_decoder_layers == 0:
        return "has no effect with --num-self-decoder-layers 0: there is no self-decoder"
    if owners and where == "yoco" and dest in options_of_others(args.self_decoder):
        return f"has no effect with --self-decoder {args.self_decoder}: it is an option of {' and '.join(owners)}"
    return ""


def _reason(entry: Entry, where: str, value: Any, args: Namespace, actions: dict[str, Any]) -> str:
    """Why a flag of `entry` with this value is refused; empty where it is not. No `actions`: not for lack of others."""
    if where not in (entry.where or ("yoco", "transformer")):
        return ""
    if entry.verdict == "no effect":
        return f"has no effect{f' on {PLACES[where]}' if entry.where else ''}: {entry.text}"
    if entry.verdict == "refused":
        return f"is refused{f' on {PLACES[where]}' if entry.where else ''}: {entry.text}"
    if actions and entry.needs and not any(_holds(need, args, actions) for need in entry.needs):
        return f"has no effect without {' or '.join(f'--{need}' for need in entry.needs)}: set both, or remove it"
    other = [_name(item) for item in (value if isinstance(value, list) else [value]) if _name(item) not in entry.values]
    return f"{' '.join(other)}: {entry.instead} (use {' or '.join(entry.values)})" if entry.values and other else ""


def _holds(need: str, args: Namespace, actions: dict[str, Any]) -> bool:
    """Whether `args` have the flag, or the flag with one of the values, that an entry has under `with`."""
    flag, *values = need.split()
    value = getattr(args, actions[flag].dest, None)
    return _name(value) in values if values else bool(value)


def _name(value: Any) -> str:
    """As on the command line."""
    return getattr(value, "name", None) or str(value)


def page() -> str:
    """docs/flags.md."""
    lines = [HEAD]
    for group, entries in _by_group().items():
        lines += ["", f"## {group}", "", "| flags | what they do |", "|---|---|"]
        lines += [f"| {' '.join(f'`--{flag}`' for flag in entry.flags)} | {_verdict(entry)} |" for entry in entries]
    return "\n".join(lines) + "\n"


def _by_group() -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in table():
        groups.setdefault(entry.group, []).append(entry)
    return groups


def _verdict(entry: Entry) -> str:
    on = f" on {' and '.join(PLACES[name] for name in entry.where)}" if entry.where else ""
    said = [f"**{entry.verdict}**{on if entry.verdict != 'works' else ''}: {entry.text}"]
    if entry.needs:
        said.append("with " + " or ".join(f"`--{need}`" for need in entry.needs) + on)
    if entry.values:
        said.append(f"{', '.join(f'`{value}`' for value in entry.values)} alone{on}: {entry.instead}")
    return "; ".join(said)


if __name__ == "__main__":
    print(page(), end="")
