"""Continue a prompt with a trained model: tools/generate.py --load RUN/checkpoints --prompt 'def main'."""

import argparse
import contextlib
import sys

from yoco_megatron import runtime

runtime.prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="checkpoint folder (the --save of training)")
    parser.add_argument("--iteration", type=int, help="checkpoint to load (default: the latest)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from yoco_megatron.checkpoint.load import load_model
    from yoco_megatron.inference.sampling import sample

    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output holds the text alone
            model, args, tokenizer = load_model(options.load, options.iteration)
    except ValueError as error:
        sys.exit(f"generate.py: error: {error}")
    prompt = tokenizer.tokenize(options.prompt)
    if not prompt:
        sys.exit("generate.py: error: --prompt has no token; give at least one character")
    new = sample(
        model,
        prompt,
        options.max_new_tokens,
        max_length=args.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.eod,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(tokenizer.detokenize([*prompt, *new]))


if __name__ == "__main__":
    main()
