"""Show what an indexed dataset (PREFIX.bin, PREFIX.idx) holds: counts, lengths, entropy, documents; verify it."""

import argparse
import json
import logging
import math
from pathlib import Path

import numpy as np

from yoco_megatron.utils.console import quiet_imports

quiet_imports()

from yoco_megatron.corpus import report
from yoco_megatron.data.check import check_data_prefixes, count_documents, count_ids, unigram_entropy
from yoco_megatron.data.loss_masks import check_masks
from yoco_megatron.data.tokenizer import add_tokenizer_arguments, use_files_of_gpt2


def main() -> None:
    # The tokenizer's flags are many: an error would come after a screen of usage.
    usage = "%(prog)s --data-path PREFIX ..."
    parser = argparse.ArgumentParser(description=__doc__, usage=usage)
    parser.add_argument("--data-path", required=True, help="prefix of the .bin and .idx files")
    parser.add_argument("--split", help="as in pretraining, such as 95,4,1: count the entropy of one --part of it")
    parser.add_argument("--part", choices=["train", "valid", "test"], help="part of --split")
    parser.add_argument("--verify", action="store_true", help="read all of it, compare with checksums if known")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="print N random documents, decoded, what is learned in ⟦⟧"
    )
    parser.add_argument("--sample-tokens", type=int, default=200, help="print at most this many tokens of each")
    parser.add_argument("--sample-seed", type=int, default=1234, help="of the choice of documents")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="plot the lengths of the documents")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_tokenizer_arguments(parser)
    args = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.WARNING)  # its readers log each step to standard output
    try:
        use_files_of_gpt2(args)
        check_data_prefixes([args.data_path])
        check_masks([args.data_path])
        checksums = report.verify(args.data_path) if args.verify else None
        tokenizer = report.tokenizer_for(args.data_path, args) if args.samples > 0 else None
        documents, tokens = count_documents(args.data_path)
        counts = count_ids(args.data_path, args.split, args.part, report.ids_end(args.data_path, args))
    except ValueError as error:
        parser.error(str(error))
    learned = report.learned_tokens(args.data_path)
    lengths, nats = report.document_lengths(args.data_path), unigram_entropy(counts)
    ids = [int(np.flatnonzero(counts)[0]), len(counts) - 1]
    if args.histogram:
        try:
            report.save_histogram(lengths, args.histogram, Path(args.data_path).name)
        except (OSError, ValueError) as error:  # no such folder, or an unknown image format
            parser.error(f"--histogram {args.histogram}: {error}")
    if args.json:
        part = {"split": args.split, "part": args.part}
        content = {
            "documents": documents,
            "tokens": tokens,
            "learned_tokens": learned,
            **part,
            "unigram_entropy_nats": nats,
            "ids": ids,
            "sha256": checksums and {file.lstrip("._"): sha256 for file, sha256 in checksums.items()},
        }
        print(json.dumps(content))
        return
    where = f" of part {args.part} of {args.split}" if args.part else ""
    print(f"{args.data_path}: {documents:,} documents, {tokens:,} tokens")
    if learned is not None:
        print(f"learned: {learned:,} tokens, {learned / tokens:.1%} of all")
    print(report.describe_lengths(lengths))
    print(f"ids{where}: {ids[0]:,} to {ids[1]:,}")
    print(f"unigram entropy{where}: {nats:.4f} nats per token (perplexity {math.exp(nats):,.1f})")
    recorded = report.recorded_sha256(args.data_path)
    for file, sha256 in (checksums or {}).items():
        how = "is whole" if recorded[file] else "fits its pair, and has no checksum to be compared with"
        print(f"{file} {how}: sha256 {sha256}")
    if lengths.max() <= 1:
        print("no document has two tokens: with --eod-mask-loss and document masking all of the loss is masked")
    if tokenizer is not None:
        sample = (args.samples, args.sample_seed, args.sample_tokens)
        for number, length, text in report.random_documents(args.data_path, tokenizer, *sample):
            print(f"\n== document {number:,}, {length:,} tokens\n{text}")


if __name__ == "__main__":
    main()
