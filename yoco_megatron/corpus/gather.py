"""From a folder of text files to a corpus: JSON lines, one document a line, in a reproducibly shuffled order.

Megatron's `--split 95,4,1` cuts an indexed dataset by position. In the order of a folder the validation part would be
whatever sorts last (all of one package, one author, one year); after a shuffle by a fixed seed it is a fair sample.
"""

import codecs
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yoco_megatron.corpus.text_encoding import foreign_encoding
from yoco_megatron.utils.progress import progress

# Installed packages are not the standard library, and Debian calls their folder dist-packages.
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class GatherReport:
    """What `gather` did: documents and UTF-8 bytes of text written; files left out because not UTF-8, or empty."""

    documents: int
    bytes: int
    not_utf8: int
    empty: int


def python_stdlib() -> tuple[Path, list[Path]]:
    """The folder of the running interpreter's standard library, and its Python sources (any order)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in root.rglob("*.py") if STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts))
    return root, [path for path in paths if path.is_file()]


def find_files(root: Path, patterns: list[str]) -> list[Path]:
    """Files below `root`, at any depth, whose name matches one of the glob patterns (any order, each once).

    Raises:
        ValueError: `root` is no folder, or nothing matches.
    """
    if not root.is_dir():
        raise ValueError(f"--input {root} is not a folder; give the folder that holds the text files")
    found = {path for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
    if not found:
        raise ValueError(f"--input {root} holds no file that matches --glob {' '.join(patterns)}")
    return list(found)


def gather(root: Path, paths: list[Path], output: Path, seed: int = 1234) -> GatherReport:
    """Write `paths` (all below `root`) to the corpus `output`, lines {"text": ..., "path": relative to root}.

    The same files and seed give the same bytes. `output` appears when it is complete. If it lies inside `root`
    it is not read as a document.

    Raises:
        ValueError: none of the files holds UTF-8 text; `output` is an existing file that is not such a corpus.
    """
    if output.is_file() and not _is_corpus(output):
        raise ValueError(f"--output {output} exists and was not written by this tool: name another file")
    aside = output.with_name(output.name + ".tmp")
    own = {output.resolve(), aside.resolve()}
    by_name = {path.relative_to(root).as_posix(): path for path in paths if path.resolve() not in own}
    names = sorted(by_name)
    random.Random(seed).shuffle(names)

    documents = size = not_utf8 = empty = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as stream:
            for name in progress(names, desc="gather", unit="file"):
                raw = by_name[name].read_bytes()
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    not_utf8 += 1
                    continue
                if foreign_encoding(raw):  # as ASCII characters in UTF-16, which are valid UTF-8
                    not_utf8 += 1
                    continue
                if not text.strip():
                    empty += 1
                    continue
                stream.write(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
                documents += 1
                size += len(raw)
        if documents == 0:
            raise ValueError(f"--input {root}: none of {len(names)} files holds UTF-8 text; check --glob")
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    return GatherReport(documents, size, not_utf8, empty)


def _is_corpus(path: Path) -> bool:
    """Whether a file is empty or begins as `gather` begins."""
    with path.open("rb") as stream:
        line = stream.readline()
    try:
        return not line or json.loads(line).keys() == {"text", "path"}
    except (ValueError, AttributeError, RecursionError):
        return False


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line of a JSON lines file.

    Raises:
        ValueError: what is wrong with the line, beginning with `where` ("file:line").
    """
    try:
        # Of bytes, json would guess the encoding: a line cut from UTF-16 becomes other characters.
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON, bytes that are not UTF-8, brackets without end
        raise ValueError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: a line must be an object such as {{"text": "..."}}, not {type(record).__name__}')
    return record


def parse_line(line: bytes, keys: list[str], where: str) -> list[bytes]:
    """The texts under `keys` of one line of a JSON lines file, in UTF-8.

    Raises:
        ValueError: what is wrong with the line, beginning with `where` ("file:line").
    """
    record = parse_object(line, where)
    for key in keys:
        if key in record and not isinstance(record[key], str):
            found = "null" if record[key] is None else f"of the type {type(record[key]).__name__}"
            raise ValueError(f"{where}: the value under the key {key!r} is {found}, not text")
        if key not in record:
            raise ValueError(f"{where}: no text under the key {key!r} (keys: {', '.join(record)}); name another key")
    try:
        return [record[key].encode("utf-8") for key in keys]
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(f"{where}: a text holds a lone surrogate, which is not Unicode text") from None
