"""Merge indexed datasets (PREFIX.bin, PREFIX.idx) of one tokenizer into one, in the given order."""

import argparse

from yoco_megatron.utils.console import quiet_imports

quiet_imports()

from yoco_megatron.corpus.merge import find_prefixes, merge, merged_prefix
from yoco_megatron.corpus.output_files import how_to_use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders: all datasets in one, by name")
    parser.add_argument(
        "--output-prefix",
        required=True,
        help="path and beginning of the name of the output; the ending of the inputs is added, as in "
        "PREFIX_text_document",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    try:
        prefixes = find_prefixes(args.input)
        output = merged_prefix(prefixes, args.output_prefix)
        report = merge(prefixes, output, args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output-prefix {args.output_prefix}: {error}")
    print(f"{output}: {report['documents']:,} documents, {report['tokens']:,} tokens of {len(prefixes)} datasets")
    print(how_to_use(output, report["tokenizer"]))


if __name__ == "__main__":
    main()
