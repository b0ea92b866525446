"""Does vLLM generate what transformers generates? For an exported model with a sliding-window self-decoder.

    pip install -e plugins/vllm
    python plugins/vllm/check.py MODEL                 # a folder of tools/convert_checkpoint.py --to hf
    python plugins/vllm/check.py --tiny FOLDER         # makes a small random model there first

Greedy tokens of ragged random prompts (longer than the window and than a prefill chunk), in float32, without and with
fast prefill; and how many rows went through each half. Exit code 1 if a token differs.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the counters live in this process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

NEW, LENGTHS = 24, (5, 40, 200, 333)


def make_tiny(folder: Path, shared_kv_sets: int) -> None:
    """A random model with every shape different; needs yoco_megatron/hf on the path."""
    import shutil

    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import yoco_megatron.hf
    from yoco_megatron.hf.configuration_yoco import YocoConfig
    from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

    torch.manual_seed(0)
    config = YocoConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_self_decoder_layers=2,
        shared_kv_sets=shared_kv_sets,
        num_attention_heads=8,
        num_key_value_heads=2,
        self_decoder="sliding_window",
        self_decoder_heads=4,
        self_decoder_key_value_heads=2,
        sliding_window=64,
        max_position_embeddings=512,
        initializer_range=0.15,
        architectures=["YocoForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_yoco.YocoConfig",
            "AutoModelForCausalLM": "modeling_yoco.YocoForCausalLM",
        },
    )
    model = YocoForCausalLM(config)
    model.generation_config.suppress_tokens = list(range(320, 512))  # as the converter forbids padded ids
    model.save_pretrained(folder)
    for file in Path(yoco_megatron.hf.__file__).parent.glob("*_yoco.py"):
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tiny", action="store_true", help="make a small random model in that folder first")
    parser.add_argument("--shared-kv-sets", type=int, default=1, help="of the small model, which has 4 cross layers")
    options = parser.parse_args()
    if options.tiny:
        make_tiny(options.model, options.shared_kv_sets)

    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, model.config.vocab_size, (length,), generator=generator) for length in LENGTHS]
    wanted = [
        model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],  # or a pad id among the random ones would be masked
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=-1,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    same = True
    for fast in (False, True):
        server = LLM(
            model=str(options.model),
            trust_remote_code=True,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=128,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,  # the default, 92%, leaves no memory for transformers' model
            kv_sharing_fast_prefill=fast,
        )
        greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        outputs = server.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], greedy)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        rows = server.apply_model(lambda served: dict(served.model.rows))[0]
        equal = [ours == theirs for ours, theirs in zip(tokens, wanted)]
        same &= all(equal)
        print(f"fast prefill {fast}: same tokens as transformers {equal}; rows {rows}")
        del server
    sys.exit(not same)


if __name__ == "__main__":
    main()
