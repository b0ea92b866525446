"""Train a byte-level BPE tokenizer on a corpus (JSON lines) and save it as a Hugging Face folder."""

import argparse
from pathlib import Path

from yoco_megatron.data.readers import expand_inputs
from yoco_megatron.data.tokenizer import tokenizer_sha256, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines files or globs")
    parser.add_argument("--json-key", default="text", help="key of a line's text")
    parser.add_argument("--vocab-size", type=int, required=True, help="size of the vocabulary, special tokens included")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    try:
        size = train_tokenizer(expand_inputs(args.input), args.vocab_size, args.output, args.json_key)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.output}: {size:,} tokens, sha256 {tokenizer_sha256(str(args.output))}")
    if size < args.vocab_size:
        print(f"the corpus is too small for --vocab-size {args.vocab_size}: give it more text, or ask for {size}")
    print(f"use it with: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {args.output}")


if __name__ == "__main__":
    main()
