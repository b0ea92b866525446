"""Tokenize a corpus into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, and a report .json.

JSON lines, parquet and plain text, also compressed (.gz, .bz2, .xz, .zst). A killed run resumes when repeated. Prompts
with completions, and messages, become PREFIX_FORMAT_document with a loss mask: training learns their answers alone.
"""

import argparse
import gc
import itertools
import json
import os
import sys
from pathlib import Path

from yoco_megatron.utils.console import quiet_imports

quiet_imports()

from yoco_megatron.corpus.encoders import BACKENDS
from yoco_megatron.corpus.formats import FORMATS
from yoco_megatron.corpus.output_files import how_to_use
from yoco_megatron.corpus.preprocess import MAX_BAD_LINES, Report, preprocess
from yoco_megatron.corpus.readers import expand_inputs
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.data.loss_masks import mask_of
from yoco_megatron.data.tokenizer import add_tokenizer_arguments, build_tokenizer, describe, use_files_of_gpt2
from yoco_megatron.utils.small_files import BadFile, read_text

# Bad records that are printed.
SHOWN = 10


def main() -> None:
    # The tokenizer's flags are many: an error would come after a screen of usage.
    usage = "%(prog)s --input FILE [FILE ...] --tokenizer-type TYPE --tokenizer-model MODEL --output-prefix PREFIX ..."
    parser = argparse.ArgumentParser(description=__doc__, usage=usage)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted globs")
    parser.add_argument(
        "--data-format",
        choices=list(FORMATS),
        default="text",
        help="of a line: texts; a prompt and the completion that is learned; messages, of which answers are learned",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="keys of a line (default: text; prompt completion; messages): of texts one dataset each; of messages one, "
        "or two, which give one conversation, and only answers under the second one are learned",
    )
    parser.add_argument("--output-prefix", required=True, help="path and beginning of the name of the outputs")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads that encode (default: all CPUs)"
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=MAX_BAD_LINES,
        metavar="N",
        help="skip and list up to N bad records; one more stops the run (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer-backend", choices=BACKENDS, default="auto", help="library that encodes; the ids are the same"
    )
    parser.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="encode text that spells a special token, such as <|endoftext|>, as any other text",
    )
    parser.add_argument("--split-sentences", action="store_true", help="encode each sentence of a document by itself")
    parser.add_argument("--keep-newlines", action="store_true", help="keep the white space between sentences")
    parser.add_argument("--lang", default="english", help="language of --split-sentences")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs, start over")
    add_tokenizer_arguments(parser)
    args = parser.parse_args()
    if not args.split_sentences and (args.keep_newlines or args.lang != parser.get_default("lang")):
        parser.error("--keep-newlines and --lang have no effect without --split-sentences")
    if args.chat_template is not None and args.data_format != "messages":
        parser.error("--chat-template has no effect without --data-format messages")
    try:
        if args.chat_template is not None:
            args.chat_template = read_template(args.chat_template)
        use_files_of_gpt2(args)
        tokenizer = build_tokenizer(args)
        gc.freeze()  # what is imported need not be looked through for each thousand of records
        about = describe(args) | {"vocab_size": tokenizer.vocab_size}
        reports = preprocess(
            expand_inputs(args.input),
            args.output_prefix,
            tokenizer,
            keys=args.json_keys or FORMATS[args.data_format],
            append_eod=args.append_eod,
            workers=args.workers,
            max_bad_lines=args.max_bad_lines,
            overwrite=args.overwrite,
            backend=args.tokenizer_backend,
            about_tokenizer=about,
            sentences=SentenceSplitter(args.lang, args.keep_newlines) if args.split_sentences else None,
            split_special_tokens=args.split_special_tokens,
            data_format=args.data_format,
        )
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # a full disk, no permission
        parser.error(
            f"--output-prefix {args.output_prefix}: {error}. Repeat the command when that is fixed; it resumes from "
            "what it saved"
        )
    for key, report in reports.items():
        if report.loss_mask is not None:
            print(
                f"{mask_of(f'{args.output_prefix}_{key}_document')}: {report.loss_mask['learned_tokens']:,} tokens are "
                f"learned, {report.loss_mask['learned_share']:.1%} of all"
            )
        print(
            f"{args.output_prefix}_{key}_document: {report.documents:,} documents, {report.tokens:,} tokens "
            f"({report.dtype}), {report.bytes:,} bytes, {report.bad_lines} bad records, "
            f"{report.empty_documents} empty, {report.documents_with_nul} with NUL, "
            f"{report.documents_with_special_tokens} with special tokens in the text; {report.backend}: "
            f"{report.tokens_per_second:,.0f} tokens/s, tokenizer sha256 {about['sha256']}"
        )
    for key, report in reports.items():
        print(how_to_use(f"{args.output_prefix}_{key}_document", report.tokenizer))
    print_problems(list(reports.values()), args.split_special_tokens)


def read_template(given: str) -> str:
    """The text of a chat template, which Megatron's flag takes itself, or in a file. Raises ValueError."""
    if "{" in given:
        return given
    try:
        return str(read_text(Path(given)))
    except BadFile as error:
        raise ValueError(f"--chat-template: {error}") from None


def print_problems(reports: list[Report], split_special_tokens: bool) -> None:
    """Print the number of bad records, the first of them, and where all are listed."""
    report = reports[0]
    spelled = sum(report.documents_with_special_tokens for report in reports)
    if spelled:
        instead = "even as plain text" if split_special_tokens else "with --split-special-tokens plain text"
        print(f"WARNING: special tokens that {spelled:,} of the texts spell become tokens; {instead}", file=sys.stderr)
    if report.bad_lines:
        print(f"WARNING: {report.bad_lines:,} bad records are skipped:", file=sys.stderr)
        with open(report.problems, encoding="utf-8") as stream:
            bad = (entry for entry in map(json.loads, stream) if entry["kind"] == "bad")
            for entry in itertools.islice(bad, SHOWN):
                print(f"  {entry['place']}: {entry['reason']}", file=sys.stderr)
        if report.bad_lines > SHOWN:
            print("  ...", file=sys.stderr)
    if report.problems:
        print(f"each bad, empty or suspicious record is listed in {report.problems}", file=sys.stderr)


if __name__ == "__main__":
    main()
