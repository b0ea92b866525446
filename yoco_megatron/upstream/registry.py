"""One list of everything of Megatron, torch and Transformer Engine that this package replaces or relies on.

`@replaces` puts a function of ours in the place of one of theirs. `relies_on` names what we override, replace for one
call, or call although it is private. Both keep a digest of the source that was read: tests/upstream/test_registry.py
compares it with what is installed, so that a new version says what to read again (CONTRIBUTING.md).
"""

import functools
import importlib
from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

Condition = Callable[[Namespace], bool]


@dataclass
class Replacement:
    """`ours` takes the place of `module`.`name`; see `replaces`."""

    ours: Any
    module: str
    name: str
    digest: str | None
    why: str
    calls: int | None
    when: Condition
    in_every_process: bool
    is_installed: bool = False
    original: Any = None

    def install(self) -> None:
        """Put ours in its place, once; AttributeError if upstream has no such name."""
        if self.is_installed:
            return
        owner, attribute = find_owner(self.module, self.name)
        self.original = getattr(owner, attribute)
        if callable(self.ours):
            self.ours.original = self.original
        setattr(owner, attribute, self.ours)
        self.is_installed = True


@dataclass
class Dependency:
    """A private name, or the behaviour of a public one, that our code at `used_by` takes for granted."""

    module: str
    name: str
    digest: str | None
    used_by: str
    why: str


replacements: list[Replacement] = []
"""In the order in which they are installed."""
dependencies: list[Dependency] = []


def replaces(
    module: str,
    name: str,
    *,
    digest: str | None,
    why: str,
    calls: int | None = None,
    when: Condition = lambda args: True,
    in_every_process: bool = False,
) -> Callable[[Any], Any]:
    """Decorator: enter a function in the list, or, called with it, any value. It calls what it replaces as `.original`.

    Of two entries for one name the later one wraps the earlier one.

    Args:
        module: where the name is looked up when it is called, which may not be where it is defined.
        name: a function's, or `Class.method`.
        digest: of the source that was read when ours was written; None for what is no function or class.
        calls: how often `module` calls it by that name, where that matters. Ours must take each call's arguments.
        when: a condition on the run's arguments, which are empty for entries of every process.
        in_every_process: installed by `startup.prepare`, else by `upstream.install` in a training run.
    """

    def enter(ours: Any) -> Any:
        replacements.append(Replacement(ours, module, name, digest, why, calls, when, in_every_process))
        return ours

    return enter


def relies_on(module: str, name: str, *, digest: str | None, used_by: str, why: str) -> None:
    """Enter what is not replaced, or only for one call. `used_by`: our file, below yoco_megatron/."""
    dependencies.append(Dependency(module, name, digest, used_by, why))


def find_owner(module: str, name: str) -> tuple[Any, str]:
    """(module or class that holds the name, its last part)."""
    *classes, attribute = name.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), attribute


def install(in_every_process: bool, args: Namespace, only: Collection[str] | None = None) -> None:
    """Install the entries of one of the two kinds whose conditions hold, in order.

    Args:
        only: names of upstream; all other entries are left out.
    """
    assert only is None or set(only) <= {entry.name for entry in replacements}, f"no such entries: {only}"
    for entry in replacements:
        if entry.in_every_process == in_every_process and (only is None or entry.name in only) and entry.when(args):
            entry.install()
