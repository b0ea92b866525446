"""Continue prompts with a trained model, from a training checkpoint or an exported folder.

    tools/generate.py --load RUN/checkpoints --prompt 'def main'
    tools/generate.py --load MODEL --prompt-file prompts.txt --temperature 0      # one prompt a line, as one batch
    cat long.txt | tools/generate.py --load MODEL                                 # all of it as one prompt
    tools/generate.py --load MODEL --prompt 'def main' --speculative              # drafts by --mtp-num-layers

The text streams to standard output; tokens/s and the size of the cache go to standard error. Several prompts are
printed at the end.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def read_prompts(options: argparse.Namespace) -> tuple[str, list[str]]:
    """(what gave them, the prompts): --prompt, --prompt-file (one a line), or standard input as one prompt.

    Raises:
        ValueError: a file that cannot be read, bytes that are no text, no prompt at all.
    """
    if options.prompt:
        for prompt in options.prompt:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # bytes of the command line
                raise ValueError(f"--prompt {prompt!a:.60} is no text: its bytes are not UTF-8")
        return "--prompt", options.prompt
    where = f"--prompt-file {options.prompt_file}" if options.prompt_file else "standard input"
    try:
        content = Path(options.prompt_file).read_bytes() if options.prompt_file else sys.stdin.buffer.read()
        text = content.decode()
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text: {error}") from None
    prompts = [line for line in text.splitlines() if line] if options.prompt_file else [text]
    if not any(prompts):
        raise ValueError(f"{where} holds no prompt")
    return where, prompts


def new_tokens(asked: int | None, where: str, prompts: list[list[int]], length: int) -> int:
    """How many tokens to generate.

    Args:
        asked: --max-new-tokens; None: 128, or what is left.
        where: what gave the prompts.
        length: of the longest sequence of the model, in tokens.
    Raises:
        ValueError: too many, or prompts that leave no room.
    """
    longest = max(map(len, prompts))
    if longest >= length:
        raise ValueError(f"{where} has {longest:,} tokens, but the model's sequences end at {length:,}: shorten it")
    if asked is not None and asked > length - longest:
        raise ValueError(
            f"--max-new-tokens {asked}: at most {length - longest} fit, as the prompt has {longest} tokens and the "
            f"model's sequences end at {length}"
        )
    return asked or min(128, length - longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run's --save, or the folder of an exported model")
    parser.add_argument("--iteration", type=int, help="training checkpoint to load (default: the latest)")
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer to use instead of the model's own")
    parser.add_argument("--prompt", action="append", help="text to continue; several of them make a batch")
    parser.add_argument("--prompt-file", help="file of prompts, one a line")
    parser.add_argument("--max-new-tokens", type=int, help="default: 128, or what the model's length leaves")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill-piece", type=int, default=32768, help="tokens of the prompt per forward pass")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "int8", "fp8"],
        default="auto",
        help="of the shared K,V; auto: the model's. int8 and fp8 (e4m3) have a scale for each token and head",
    )
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="have the model's layers of multi-token prediction draft tokens, which it checks several at once: the "
        "same text (but for rounding) in fewer passes, of one prompt",
    )
    options = parser.parse_args()
    if options.prompt and options.prompt_file:
        parser.error("--prompt and --prompt-file: use only one of them")
    for name in ("max_new_tokens", "prefill_piece"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    try:
        run(options)
    except ValueError as error:
        sys.exit(f"generate.py: error: {error}")


def run(options: argparse.Namespace) -> None:
    """Load, generate, print."""
    # Slow imports, after --help and after mistyped flags.
    from yoco_megatron import runtime
    from yoco_megatron.startup.prepare import prepare

    prepare()
    from yoco_megatron.convert import tokenizer_files
    from yoco_megatron.inference.generation import Decoder, Sampling, decoder_for, generate
    from yoco_megatron.inference.load import is_baseline, load_baseline, load_for_generation
    from yoco_megatron.inference.speculative import Speculation, speculative_decoder
    from yoco_megatron.inference.uncached import UncachedDecoder
    from yoco_megatron.ops.attention import quantized

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    where, texts = read_prompts(options)
    baseline = is_baseline(options.load)
    kv_cache_dtype = None if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    quantized.check(kv_cache_dtype)
    for flag, value, lacks in (
        ("--speculative", options.speculative, "drafts"),
        ("--kv-cache-dtype", kv_cache_dtype, "cache"),
    ):
        if baseline and value:
            raise ValueError(
                f"{flag}: --load {options.load} is a Transformer baseline, which has no {lacks}: remove it"
            )
    model: Any  # Megatron's or transformers'
    with contextlib.redirect_stdout(sys.stderr):  # Megatron logs there, where only the text belongs
        if baseline:
            model, tokenizer, max_length = load_baseline(options.load, options.iteration, options.tokenizer)
        else:
            model, tokenizer = load_for_generation(
                options.load,
                options.iteration,
                runtime.device(),
                tokenizer=options.tokenizer,
                speculative=options.speculative,
            )
    if tokenizer is None:
        raise ValueError(
            f"--load {options.load}: the model has no Hugging Face tokenizer, so it cannot read text: name one with "
            "--tokenizer"
        )
    sampling = replace(sampling, vocab_size=tokenizer_files.rows(tokenizer))
    prompts = [tokenizer_files.ids(tokenizer, text) for text in texts]
    length = max_length if baseline else model.config.max_position_embeddings
    most = new_tokens(options.max_new_tokens, where, prompts, length)
    if baseline:
        decoder: Decoder = UncachedDecoder(model, max_length)
    elif options.speculative:
        most_tokens = max(map(len, prompts)) + most
        decoder = speculative_decoder(model, most_tokens, options.prefill_piece, kv_cache_dtype)
    else:
        decoder = decoder_for(model, prompts, most, options.prefill_piece, kv_cache_dtype)
    steps = generate(decoder, prompts, most, sampling, end=tokenizer.eos_token_id)
    new: list[list[int]] = [[] for _ in prompts]
    shown = ""
    started = time.perf_counter()
    first = None
    if len(prompts) == 1:
        print(texts[0], end="", flush=True)
    for tokens in steps:
        first = first or time.perf_counter()
        for row, token in zip(new, tokens):
            if token is not None:
                row.append(token)
        if len(prompts) == 1:
            text = tokenizer_files.text_after(tokenizer, prompts[0], new[0])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: its other bytes are to come
                print(text[len(shown) :], end="", flush=True)
                shown = text
    done = time.perf_counter()
    if len(prompts) == 1:
        print(tokenizer_files.text_after(tokenizer, prompts[0], new[0])[len(shown) :])
    else:
        for text, prompt, row in zip(texts, prompts, new):
            print(f"{text}{tokenizer_files.text_after(tokenizer, prompt, row)}\n")
    first = first or done
    count = sum(map(len, new))
    decoded = f", {(count - len(prompts)) / (done - first):.1f} tokens/s decoded" if count > len(prompts) else ""
    print(
        f"{sum(map(len, prompts))} prompt tokens in {first - started:.2f} s, {count} new tokens{decoded}, "
        f"cache of {decoder.nbytes():,} bytes",
        file=sys.stderr,
    )
    if isinstance(decoder, Speculation):
        print(f"{decoder.accepted} of {decoder.verified} drafts accepted", file=sys.stderr)


if __name__ == "__main__":
    main()
