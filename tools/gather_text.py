"""Gather a folder of text files, or Python's standard library, into a corpus (JSON lines, one document a line)."""

import argparse
from pathlib import Path

from yoco_megatron.corpus.gather import find_files, gather, python_stdlib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="folder of text files, searched at any depth")
    source.add_argument("--python-stdlib", action="store_true", help="source of this Python's standard library")
    parser.add_argument("--glob", nargs="+", default=["*"], help="file names to take from --input, such as '*.py'")
    parser.add_argument("--output", type=Path, required=True, help="corpus to write, such as corpus.jsonl")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the shuffle")
    args = parser.parse_args()
    if args.python_stdlib and args.glob != parser.get_default("glob"):
        parser.error("--glob goes with --input: the standard library's sources are *.py")
    try:
        root, paths = python_stdlib() if args.python_stdlib else (args.input, find_files(args.input, args.glob))
        report = gather(root, paths, args.output, args.seed)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {args.output}: {error}")
    print(f"{args.output}: {report.documents:,} documents, {report.bytes:,} bytes of text")
    print(f"left out: {report.not_utf8} files that are not UTF-8, {report.empty} empty files")


if __name__ == "__main__":
    main()
