"""Changes of upstream that are undone at the end of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from yoco_megatron.upstream.registry import find_owner, replacements


@contextmanager
def restored() -> Iterator[None]:
    """At the end, what was installed inside is taken out again."""
    before = [id(entry) for entry in replacements if entry.is_installed]
    try:
        yield
    finally:
        for entry in reversed(replacements):  # which may have grown, as modules with more of them were imported
            if entry.is_installed and id(entry) not in before:
                setattr(*find_owner(entry.module, entry.name), entry.original)
                entry.is_installed = False
