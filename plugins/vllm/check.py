"""Does vLLM generate what transformers generates? For exported models, with fast prefill and prefix caching.

    pip install -e plugins/vllm
    PYTHONPATH=. python plugins/vllm/check.py MODEL...        # folders of tools/convert_checkpoint.py --to hf
    PYTHONPATH=. python plugins/vllm/check.py --tiny FOLDER   # makes small random models there, and checks them

Greedy tokens, in float32, of ragged random prompts: of one token, and longer than the window and than a piece of a
prefill. Few sequences run at once, so that prefills meet decodes and a sequence takes the place of one that has ended.
All are asked for twice, the second time from the prefix cache where it is on. Prints how many rows went through each
half. Exit code 1 if a token differs.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # functions of this module reach the workers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # the same

MODES = ({}, {"kv_sharing_fast_prefill": True}, {"kv_sharing_fast_prefill": True, "enable_prefix_caching": True})
NEW, LENGTHS = 24, (5, 40, 1, 333, 200, 1, 127, 64)


def make_tiny(folder: Path, self_decoder: str, shared_kv_sets: int) -> Path:
    """A random model with every shape different; needs yoco_megatron/hf on the path."""
    import shutil

    import torch

    import yoco_megatron.hf
    from yoco_megatron.hf.configuration_yoco import YocoConfig
    from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

    folder = folder / f"{self_decoder}_{shared_kv_sets}"
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
        self_decoder=self_decoder,
        self_decoder_heads=4,
        self_decoder_key_value_heads=2 if self_decoder == "sliding_window" else None,
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
    return folder


def check(folder: Path, ranks: int, mode: dict[str, bool]) -> bool:
    """Print what vLLM generates; is it what transformers does?"""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
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
    server = LLM(
        model=str(folder),
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=ranks,
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=3,
        kv_cache_memory_bytes=2**30,  # the default, 92%, leaves no memory for transformers' model
        **{"enable_prefix_caching": False} | mode,
    )
    server.apply_model(spoil)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    found = [list(output.outputs[0].token_ids) for _ in range(2) for output in server.generate(asked, greedy)]
    equal = [ours == theirs for ours, theirs in zip(found, 2 * wanted, strict=True)]
    rows = server.apply_model(rows_of)[0]
    print(f"{folder}, {ranks} ranks, {mode}: {sum(equal)} of {len(equal)} as transformers; rows {rows}", flush=True)
    return all(equal)


def spoil(served) -> None:
    """States begin as other sequences left them: here, with nothing of use."""
    for layer in served.model.self_layers:
        for state in getattr(layer.mixer, "kv_cache", ()):
            state.fill_(float("nan"))


def rows_of(served) -> dict[str, int]:
    """How many rows went through each half of a worker's model."""
    return dict(served.model.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tiny", action="store_true", help="make small random models in that folder first")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    options = parser.parse_args()
    models = options.models
    if options.tiny:
        models = [make_tiny(models[0], kind, sets) for kind in ("sliding_window", "gated_retention") for sets in (1, 2)]
    results = [check(model, options.tensor_parallel_size, mode) for model in models for mode in MODES]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
