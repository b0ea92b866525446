"""Dry run of the data: epochs, samples and tokens of each source. Takes the flags and configs of pretrain_yoco.py."""

import argparse
import json
import logging
import sys
from dataclasses import asdict

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_count(text: str) -> int:
    """12_000, 300B or 1.6T."""
    scale = SUFFIXES.get(text[-1:].upper(), 1)
    number = text[:-1] if scale > 1 else text
    try:
        return round(float(number) * scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens such as 300B") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action="help", help="all other flags are those of pretrain_yoco.py")
    parser.add_argument("--token-budget", type=token_count, help="tokens to train on; by default what the flags say")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own, argv = parser.parse_known_args()
    # Slow imports, after --help.
    from yoco_megatron.startup.prepare import prepare

    prepare()  # before anything imports megatron
    from yoco_megatron.data.plan import plan, table, train_samples
    from yoco_megatron.startup import arguments

    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        args = arguments.parse_anywhere(argv)
        samples = own.token_budget // args.seq_length if own.token_budget else train_samples(args)
        sources = plan(args, samples)
    except ValueError as error:
        sys.exit(f"plan_data.py: error: {error}")
    if own.json:
        print(json.dumps([asdict(source) for source in sources]))
    else:
        print(table(sources, args.seq_length, samples))


if __name__ == "__main__":
    main()
