"""Convert a YOCO between training checkpoints, Hugging Face, flash-linear-attention and the authors' layout.

    tools/convert_checkpoint.py --from megatron --input RUN/checkpoints --to hf --output MODEL
    tools/convert_checkpoint.py --from hf --input MODEL --to megatron --output NEW/checkpoints

Works tensor by tensor, so that a model may be larger than memory. Success means that both models were run and their
logits agree; otherwise nothing is written. No GPU is used.
"""

import argparse
import contextlib
import logging
import os
import sys

from yoco_megatron.convert import SOURCES, TARGETS

# The models are compared in fp32, which Transformer Engine would round to TF32, and need not fit into a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="kind", required=True, choices=SOURCES, help="format of the input")
    parser.add_argument("--input", required=True, help="its folder (a run's --save for megatron)")
    parser.add_argument("--to", required=True, choices=TARGETS, help="format of the output")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--iteration", type=int, help="which training checkpoint (default: the latest)")
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer to ship instead of the input's own")
    parser.add_argument("--max-shard-size", type=float, default=2.0, help="GiB per safetensors file (default 2)")
    parser.add_argument("--license", help="of the model, for its card: an id of the hub, such as apache-2.0")
    parser.add_argument("--language", help="of the texts, for the card, such as en; several with commas")
    options = parser.parse_args()
    card = {name: value for name in ("license", "language") if (value := getattr(options, name))}
    if card and options.to != "hf":
        parser.error("--license and --language have no effect without --to hf, which has a model card")
    # Slow imports, after --help and after mistyped flags.
    from yoco_megatron.startup.prepare import prepare

    prepare()
    from transformers.utils.logging import disable_progress_bar

    from yoco_megatron.convert.convert import convert

    disable_progress_bar()  # of the comparison

    logging.basicConfig(level=logging.WARNING, format="convert_checkpoint.py: %(message)s")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = convert(
                options.kind,
                options.input,
                options.to,
                options.output,
                iteration=options.iteration,
                tokenizer=options.tokenizer,
                shard_bytes=int(options.max_shard_size * 1024**3),
                card=card,
            )
    except ValueError as error:
        sys.exit(f"convert_checkpoint.py: error: {error}")
    print(f"{options.output}: {report}")
    if options.to == "hf":
        print(f"generate with it: tools/generate.py --load {options.output} --prompt 'Once upon a time'")
        print(f"upload it:        tools/upload_model.py --input {options.output} --repo NAME/MODEL")
    if options.to == "megatron":
        print(f"train from it:    --load {options.output} --finetune")


if __name__ == "__main__":
    main()
