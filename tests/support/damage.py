"""Damage to files, and what a reader may do about it: tests/test_fuzz.py holds the formats.

A new format is one `Format` in `FORMATS` there: how to write a whole file, and the project's function that reads it.

    Format("header.idx", write=lambda folder: write_dataset(folder), read=lambda path: check_data_prefixes([...]))

`check` then damages the file some hundred times, always in the same ways, and wants one of three ends each time: a
ValueError that names the file; the result of the whole file, where the damage touched nothing that the reader depends
on; or another result that `valid` says could have been written as well. Everything else fails: another exception, a
reading that takes longer than SECONDS, and memory that grows by more than MEMORY.
"""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60  # what would never end; a busy machine may stand still for seconds
MEMORY = 768 << 20  # 16 MiB of JSON, the largest that is read, as Python's objects, with room

VALUES: list[Any] = [None, True, False, 0, -1, 2, 2**31, 2**63, 10**30, 1e308, 0.5, "", "x", "9" * 5000, "/dev/zero"]
VALUES += ["../x", "\x00", "\ud800", [], {}, [[]], [None], {"a": {"a": {}}}, [1] * 1000]
INTEGERS = [0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)]


def _yaml_bomb(first: bytes, form: bytes) -> bytes:
    """Few lines whose aliases stand for 9**30 values."""
    lines = [first, *(form % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 30))]
    return b"\n".join(lines)


BOMBS = [_yaml_bomb(b"a0: &a0 [x]", b"a%d: &a%d [%s]"), _yaml_bomb(b"a0: &a0 {x: 1}", b"a%d: &a%d {<<: [%s]}")]
CONTENTS = [b"", b"\x00" * 4096, b"\xff\xfe", bytes(range(256)), b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"[NaN]"]
CONTENTS += [b"[" * 200_000, b'{"a":' * 100_000, b"{a: " * 2000, b"- " * 20000, b"9" * 10_000, b"{}{}", *BOMBS]
CONTENTS += [b"[" + b"[]," * (6 << 20) + b"[]]"]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        name: of the test.
        write: given an empty folder, writes a whole file, and what belongs beside it; returns its path.
        read: what the project does with that path; its result, or None where it only checks.
        valid: whether a result other than the whole file's could have been written; by default none could.
        count: random damages.
        named: whether an error names the file; a function whose caller adds the name says no.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    valid: Callable[[Any], bool] = lambda result: False
    count: int = 150
    named: bool = True


def check(form: Format, folder: Path, seed: int = 0) -> None:
    """Damage a file of the format in many ways, and read each. Raises AssertionError for the first wrong end."""
    path = form.write(folder)
    content, random_ = path.read_bytes(), random.Random(f"{form.name} {seed}")
    whole = form.read(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number, damaged in enumerate(damages(content, random_, form.count)):
        path.write_bytes(damaged)
        refused += _read(form, path, whole, f"damage {number}: {damaged[:300]!r}")
    for what, stand_in in STAND_INS.items():
        _remove(path)
        stand_in(path)
        refused += _read(form, path, whole, what)
    _remove(path)
    path.write_bytes(content)
    assert form.read(path) == whole, f"{form.name}: reading damaged files has changed something"
    assert refused, f"{form.name}: nothing was refused"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY, f"{form.name}: memory grew by {grown:,} bytes"


def _read(form: Format, path: Path, whole: Any, what: str) -> bool:
    """Whether the file was refused."""
    error: BaseException | None = None
    try:
        with _in_time():
            result = form.read(path)
    except BaseException as raised:
        error = raised
    where = f"{form.name}, {what}"
    if error is None:
        assert result == whole or form.valid(result), f"{where}: taken without a word: {str(result)[:300]}"
        return False
    ours = type(error) is ValueError or (isinstance(error, ValueError) and "yoco" in type(error).__module__)
    if not ours:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    assert not form.named or path.name in str(error), f"{where}: no file named: {error}"
    return True


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"takes longer than {SECONDS} s")

    logging.disable()
    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        logging.disable(logging.NOTSET)


# -- what may stand in a file's place


def _unreadable(path: Path) -> None:
    path.touch()
    path.chmod(0)  # root reads it all the same, and finds it empty


STAND_INS: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "no permission": _unreadable,
}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- what may have happened to its content


def damages(content: bytes, random_: random.Random, count: int) -> Iterator[bytes]:
    """The contents that are always tried, and `count` others."""
    yield from CONTENTS
    yield from (content[: len(content) // 2], content[:-1], content + content, content + b"\x00")
    try:
        tree = json.loads(content)
    except ValueError:
        tree = None
    for _ in range(count):
        if tree is not None and random_.random() < 0.5:
            yield _other_value(tree, random_)
        else:
            yield _other_bytes(content, random_)


def _other_bytes(content: bytes, random_: random.Random) -> bytes:
    start = random_.randrange(len(content) + 1)
    end = min(len(content), start + random_.choice([1, 2, 4, 8, 64, len(content)]))
    piece = content[start:end]
    width = random_.choice([4, 8])
    number = random_.choice(INTEGERS) & ((1 << 8 * width) - 1)
    flipped = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 8])):
        flipped[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    other = random_.randrange(len(content) + 1)
    return random_.choice(
        [
            content[:start],
            bytes(flipped),
            bytes(flipped),
            content[:start] + content[end:],
            content[:start] + bytes(len(piece)) + content[end:],
            content[:start] + random_.randbytes(len(piece)) + content[end:],
            content[:start] + piece * 3 + content[end:],
            content[:other] + piece + content[other:],
            content[:start] + number.to_bytes(width, "little") + content[start + width :],
        ]
    )


def _other_value(tree: Any, random_: random.Random) -> bytes:
    """JSON with another value, another key, one key less or one twice, somewhere."""
    tree = json.loads(json.dumps(tree))
    places = [*_places(tree)]
    if not places:
        return json.dumps(random_.choice(VALUES)).encode()
    parent, key = random_.choice(places)
    how = random_.choice(["value", "value", "value", "remove", "rename", "twice", "swap"])
    if how == "value" or isinstance(parent, list):
        parent[key] = random_.choice(VALUES)
    elif how == "remove":
        del parent[key]
    elif how == "rename":
        parent[f"{key}x"] = parent.pop(key)
    elif how == "swap":
        other, name = random_.choice(places)
        parent[key], other[name] = json.loads(json.dumps([other[name], parent[key]]))
    text = json.dumps(tree)
    if how == "twice":
        name = json.dumps(key)
        text = text.replace(f"{name}:", f"{name}: {json.dumps(random_.choice(VALUES))}, {name}:", 1)
    return text.encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    for key in keys:
        yield tree, key
        yield from _places(tree[key])
