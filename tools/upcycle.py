"""Make a YOCO of a Transformer that you have: Llama, Mistral, Qwen2 and Qwen3 in Hugging Face's format.

    tools/upcycle.py --teacher LLAMA --output MODEL --self-decoder sliding_window --self-decoder-window 1024
    tools/upcycle.py --teacher LLAMA --output NEW/checkpoints --to megatron --self-decoder gated_retention

The teacher's weights are copied where a YOCO has a place for them; the rest is said. The result has to be trained: see
docs/upcycling.md. Works tensor by tensor, so that a model may be larger than memory. No GPU is used.
"""

import argparse
import contextlib
import logging
import os
import sys

from yoco_megatron.upcycling import MIXERS, SHARED_KV_FROM

# The models are compared in fp32, which Transformer Engine would round to TF32, and need not fit into a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the Transformer (safetensors)")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--to", default="hf", choices=("hf", "megatron"), help="format of the output (default hf)")
    parser.add_argument("--self-decoder", required=True, choices=MIXERS, help="mixer of the lower layers")
    parser.add_argument("--self-decoder-window", type=int, help="keys that a window query sees (default 1024)")
    parser.add_argument("--num-self-decoder-layers", type=int, help="lower layers (default half, rounded down)")
    parser.add_argument("--shared-kv-sets", type=int, default=1, help="K,V sets of the upper layers (default 1)")
    parser.add_argument(
        "--shared-kv-from",
        default="mean",
        choices=SHARED_KV_FROM,
        help="which of the layers that read a set give its k and v (default mean, of all of them)",
    )
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer to ship instead of the teacher's")
    parser.add_argument("--max-shard-size", type=float, default=2.0, help="GiB per safetensors file (default 2)")
    options = parser.parse_args()
    # Slow imports, after --help and after mistyped flags.
    from yoco_megatron.startup.prepare import prepare

    prepare()
    from yoco_megatron.upcycling.upcycle import upcycle

    logging.basicConfig(level=logging.WARNING, format="upcycle.py: %(message)s")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = upcycle(
                options.teacher,
                options.to,
                options.output,
                self_decoder=options.self_decoder,
                window=options.self_decoder_window,
                num_self_decoder_layers=options.num_self_decoder_layers,
                shared_kv_sets=options.shared_kv_sets,
                shared_kv_from=options.shared_kv_from,
                tokenizer=options.tokenizer,
                shard_bytes=int(options.max_shard_size * 1024**3),
            )
    except ValueError as error:
        sys.exit(f"upcycle.py: error: {error}")
    print(f"{options.output}: {report}")


if __name__ == "__main__":
    main()
