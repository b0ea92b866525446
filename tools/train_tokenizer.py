"""Train a byte-level BPE tokenizer on a corpus, or make one of bytes, as a Hugging Face folder.

tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output TOKENIZER
tools/train_tokenizer.py --bytes --output TOKENIZER                    # one token per byte; no training
"""

import argparse
from pathlib import Path

from yoco_megatron.corpus.readers import expand_inputs
from yoco_megatron.corpus.tokenizer_training import byte_tokenizer, train_tokenizer
from yoco_megatron.data.tokenizer import tokenizer_sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--bytes", action="store_true", help="one token per byte; without --input and --vocab-size")
    kind.add_argument(
        "--input", nargs="+", help="files, folders or quoted globs, as tools/preprocess_data.py takes them"
    )
    parser.add_argument("--json-key", default="text", help="key of a line's text")
    parser.add_argument("--vocab-size", type=int, help="size of the vocabulary, special tokens included")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.bytes and args.vocab_size is not None:
        parser.error("--vocab-size goes with --input: --bytes has a fixed size")
    if not args.bytes and args.vocab_size is None:
        parser.error("--vocab-size is missing: how many tokens, special ones included?")
    try:
        if args.bytes:
            size = byte_tokenizer(args.output)
        else:
            size = train_tokenizer(expand_inputs(args.input), args.vocab_size, args.output, args.json_key)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {args.output}: {error}")
    print(f"{args.output}: {size:,} tokens, sha256 {tokenizer_sha256(str(args.output))}")
    if args.vocab_size is not None and size < args.vocab_size:
        print(f"the corpus is too small for --vocab-size {args.vocab_size}: give it more text, or ask for {size}")
    print(f"use it with: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {args.output}")


if __name__ == "__main__":
    main()
