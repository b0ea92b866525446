"""Changes of upstream that are undone at the end of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from yoco_megatron.upstream.registry import find_owner, replacements


@contextmanager
def restored() -> Iterator[None]:
    """At the end, what was installed inside is taken out again."""
    before = [entry.is_installed for entry in replacements]
    try:
        yield
    finally:
        for entry, was_installed in reversed(list(zip(replacements, before, strict=True))):
            if entry.is_installed and not was_installed:
                setattr(*find_owner(entry.module, entry.name), entry.original)
                entry.is_installed = False
