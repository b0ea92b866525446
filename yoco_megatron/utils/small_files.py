"""Small files that something else wrote, read with restraint: a crash, a full disk or a stranger may have had them.

What is no regular file (a device would never end, a pipe never begin), is larger than such files are, or holds
something else than it should is one error that names the file. Plain Python, so that launchers can use it.
"""

import errno
import json
import math
import os
import stat
import types
import warnings
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

LIMIT = 16 << 20
"""Bytes of the largest file that is read; JSON of that size takes at most some 25 times as much memory."""
REQUIRED: Any = object()
# Errors that another attempt would meet again. Others, such as a network file system's, may pass.
LASTING = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)


class BadFile(ValueError):
    """A file that is not what it should be; the text begins with its path."""


def read_bytes(path: Path, limit: int = LIMIT, missing: Any = REQUIRED) -> Any:
    """The content of a regular file.

    Args:
        limit: bytes that it may have.
        missing: what to return where there is no file.
    Raises:
        BadFile: it is missing and must not be, cannot be opened, is no regular file, or is larger.
        OSError: the file system fails.
    """
    try:
        # A pipe would keep open() waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):  # the latter: in a "folder" that is a file
        if missing is REQUIRED:
            raise BadFile(f"{path} is missing") from None
        return missing
    except OSError as error:
        if error.errno not in LASTING:
            raise
        raise BadFile(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{path} is no regular file")
    with open(descriptor, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise BadFile(f"{path} has more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = LIMIT, missing: Any = REQUIRED) -> Any:
    """As `read_bytes`, decoded as UTF-8. Raises BadFile, OSError."""
    content = read_bytes(path, limit, missing)
    if content is missing:
        return missing
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not text: {error}") from None


def read_json(
    path: Path, kind: Any = dict[str, Any], missing: Any = REQUIRED, fix: str = "", limit: int = LIMIT
) -> Any:
    """The content of a JSON file.

    Args:
        kind: its type, as `mismatch` takes it.
        missing: what to return where there is no file.
        fix: what to do where it cannot be read, to end the error with.
    Raises:
        BadFile: as `read_bytes`, and where it is not JSON or of another type.
        OSError: the file system fails.
    """
    try:
        text = read_text(path, limit, missing)
        return missing if text is missing else parse_json(text, kind)
    except BadFile as error:
        raise BadFile(f"{error}{fix and ': '}{fix}") from None
    except ValueError as error:
        raise BadFile(f"{path} {error}{fix and ': '}{fix}") from None


def read_json_lines(path: Path, kind: Any = dict[str, Any]) -> list[Any]:
    """The lines of a file of JSON lines that are of type `kind`; others are left out, with a warning. [] if missing.

    Raises:
        BadFile: as `read_bytes`.
        OSError: the file system fails.
    """
    found = []
    for number, line in enumerate(read_bytes(path, missing=b"").splitlines(), 1):
        try:
            found.append(parse_json(line.decode(), kind))
        except ValueError as error:
            warnings.warn(f"{path}, line {number}: {error}: left out", stacklevel=2)
    return found


def parse_json(text: str, kind: Any = Any) -> Any:
    """JSON without what would be misread: a name that occurs twice, NaN, a number beyond 64 bits, endless nesting.

    Raises:
        ValueError: the text is not that, or its value not of type `kind` (see `mismatch`).
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_int64
        )
    except RecursionError:
        raise ValueError("is not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    wrong = mismatch(value, kind)
    if wrong:
        raise ValueError(f"does not hold what it should: {wrong}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _int64(digits: str) -> int:
    if len(digits) <= 20 and -(1 << 63) <= (value := int(digits)) < 1 << 64:
        return value
    raise ValueError(f"{digits[:20]}... is too large")


def _finite(digits: str) -> float:
    if math.isfinite(value := float(digits)):
        return value
    raise ValueError(f"{digits[:20]} is too large")


def mismatch(value: Any, kind: Any, where: str = "the content") -> str | None:
    """What makes a JSON value no `kind`, or None if it is one.

    Args:
        kind: Any, None, a class (an int is a float too, a bool is neither), list[X] or tuple[X, ...], tuple[X, Y] for a
            list of so many, dict[str, X], Literal, X | Y, or a TypedDict, whose values may have further entries.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin in (Union, types.UnionType):
        wrong = [mismatch(value, part, where) for part in parts]
        return None if None in wrong else wrong[0]
    if origin is Literal:
        fits = any(type(value) is type(part) and value == part for part in parts)
        return None if fits else f"{where} is {_short(value)}, none of {', '.join(map(repr, parts))}"
    if is_typeddict(kind):
        wrong_type = mismatch(value, dict, where)
        missing = [] if wrong_type else sorted(kind.__required_keys__ - value.keys())
        if wrong_type or missing:
            return wrong_type or f"{where} has no {missing[0]!r}"
        types_of = get_type_hints(kind)
        return _first(mismatch(value[key], types_of[key], repr(key)) for key in value if key in types_of)
    if origin is tuple and parts[-1] is ...:
        origin, parts = list, parts[:1]
    if origin is tuple:
        wrong_type = mismatch(value, list, where)
        if wrong_type or len(value) != len(parts):
            return wrong_type or f"{where} has {len(value)} entries, not {len(parts)}"
        return _first(mismatch(item, part, where) for item, part in zip(value, parts))
    expected = origin or (type(None) if kind is None else kind)
    fits = isinstance(value, (int, float) if expected is float else expected)
    if not fits or (isinstance(value, bool) and expected is not bool):
        return f"{where} is {_short(value)}, not {expected.__name__}"
    if not parts:
        return None
    if expected is list:
        return _first(mismatch(item, parts[0], f"entry {index} of {where}") for index, item in enumerate(value))
    return _first(mismatch(item, parts[1], repr(key)) for key, item in value.items())


def _first(wrong: Any) -> str | None:
    return next((one for one in wrong if one is not None), None)


def _short(value: Any) -> str:
    text = f"{value!r:.41}" if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
