"""Merge indexed datasets (PREFIX.bin, PREFIX.idx) of one tokenizer into one, in the given order."""

import argparse
import warnings

warnings.filterwarnings("ignore", module="megatron")  # about layers, optimizers and ranks: there are none here

from yoco_megatron.corpus.merge import find_prefixes, merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders: all datasets in one, by name")
    parser.add_argument("--output-prefix", required=True, help="prefix of the merged .bin, .idx and .json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    try:
        prefixes = find_prefixes(args.input)
        report = merge(prefixes, args.output_prefix, args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output-prefix {args.output_prefix}: {error}")
    print(f"{args.output_prefix}: {report['documents']:,} documents, {report['tokens']:,} tokens of {len(prefixes)}")


if __name__ == "__main__":
    main()
