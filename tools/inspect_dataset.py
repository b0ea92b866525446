"""What an indexed dataset (PREFIX.bin, PREFIX.idx) holds: documents, tokens, entropy of the token frequencies."""

import argparse
import json
import math
import warnings

warnings.filterwarnings("ignore", module="megatron")  # about layers, optimizers and ranks: there are none here

from yoco_megatron.data.check import check_data_prefixes, count_documents, unigram_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", required=True, help="prefix of the .bin and .idx files")
    parser.add_argument("--split", help="as in pretraining, such as 95,4,1: count the entropy of one --part of it")
    parser.add_argument("--part", choices=["train", "valid", "test"], help="part of --split")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        check_data_prefixes([args.data_path])
        documents, tokens = count_documents(args.data_path)
        nats = unigram_entropy(args.data_path, args.split, args.part)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        part = {"split": args.split, "part": args.part}
        print(json.dumps({"documents": documents, "tokens": tokens, **part, "unigram_entropy_nats": nats}))
        return
    where = f" of part {args.part} of {args.split}" if args.part else ""
    print(f"{args.data_path}: {documents:,} documents, {tokens:,} tokens")
    print(f"unigram entropy{where}: {nats:.4f} nats a token (perplexity {math.exp(nats):,.1f})")


if __name__ == "__main__":
    main()
