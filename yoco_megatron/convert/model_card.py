"""The README.md of an exported model."""

from typing import Any

import yaml

from yoco_megatron.convert.config_fields import sizes
from yoco_megatron.convert.readers import Source
from yoco_megatron.costs.memory import cache_bytes
from yoco_megatron.costs.shape import parameter_count
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import mixers_in

CARD = """---
{head}
---

# {title}

A YOCO ([You Only Cache Once](https://arxiv.org/abs/2405.05254)) language model, {origin}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

`trust_remote_code` runs the modules of this folder, which need torch and transformers 5. To fine-tune the model there
are `AutoModelForSequenceClassification` and peft's LoRA, which finds the linear layers by itself.

{evaluation}## The model

| | |
|---|---|
{rows}

The cache of a sequence is {per_token:,} bytes a token for {kv} and {fixed:,} bytes of {what} whatever its
length. Prompts are prefilled without the cross-decoder.
"""

ORIGIN = {
    "megatron": "exported by yoco-megatron from its\ntraining format",
    "upcycled": "made by yoco-megatron of a Transformer's\n"
    "weights and not trained since: a beginning, which writes worse text than that Transformer",
}


def model_card(source: Source, dtype: str) -> str:
    """Markdown: what the model is, how it was trained as far as the source says, how to load it."""
    config, facts = source.config, source.facts
    width = 2 if dtype in ("bfloat16", "float16") else 4
    shape = sizes(config)
    count = sum(parameter_count(shape).values())
    per_token, fixed = cache_bytes(shape, width)
    split = f"{config.num_self_decoder_layers} + {config.num_hidden_layers - config.num_self_decoder_layers}"
    rows = {
        "parameters": f"{count:,} ({dtype})",
        **({"experts": _experts(config)} if config.num_experts else {}),
        "layers": f"{split} (self-decoder + cross-decoder)",
        "self-decoder": " and ".join(mixer.description(shape) for mixer in mixers_in(shape.self_decoder)),
        "hidden size, FFN": f"{config.hidden_size}, {config.intermediate_size}",
        "self-decoder heads": f"{config.self_decoder_heads} of width {config.self_decoder_head_dim}",
        "cross-decoder heads": f"{config.num_attention_heads} of width {config.head_dim} over "
        f"{config.num_key_value_heads} K,V heads",
        "shared K,V sets": str(config.shared_kv_sets)
        + (f", of layers {', '.join(map(str, config.kv_names))}" if config.shared_kv_sources else ""),
        **({"cross-decoder layers": pattern} if (pattern := config.cross_decoder_pattern) else {}),
        **({"queries and keys": "RMSNorm of each head before RoPE, in softmax attention"} if config.qk_norm else {}),
        **({"biases": "of queries, keys and values, in softmax attention"} if config.qkv_bias else {}),
        "vocabulary": f"{config.vocab_size:,} rows",
        "RoPE": f"base {config.rope_theta:g}, {config.rope_variant} frequencies"
        + (f", low ones divided by {config.rope_scaling_factor:g}" if config.use_rope_scaling else ""),
        "trained to length": f"{facts.get('seq_length') or config.max_position_embeddings:,}",
    }
    if facts.get("iteration"):
        rows["iterations"] = f"{facts['iteration']:,}"
    if facts.get("samples") and facts.get("seq_length"):
        rows["tokens seen"] = f"{facts['samples'] * facts['seq_length']:,}"
    if facts.get("data"):
        rows["data"] = ", ".join(facts["data"])
    rows |= {f"`{name}`": str(value) for name, value in facts.get("flags", {}).items()}
    return CARD.format(
        head=_head(source.card),
        evaluation=_evaluation(facts),
        title=f"YOCO {count / 1e9:.2g}B" if count >= 1e9 else f"YOCO {count / 1e6:.3g}M",
        origin=ORIGIN.get(source.kind, f"exported by yoco-megatron from its\n{source.kind} format"),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        per_token=per_token,
        kv="the one global K,V" if config.shared_kv_sets == 1 else f"{config.shared_kv_sets} global sets of K,V",
        fixed=fixed,
        what=" and ".join(mixer.require("cache") for mixer in mixers_in(shape.self_decoder)),
    )


def _experts(config: YocoConfig) -> str:
    layers, shared = sum(config.layers_with_experts), config.shared_expert_intermediate_size
    of = f"{config.num_experts_per_tok} of {config.num_experts} for each token, {config.moe_intermediate_size} wide"
    return f"{of}, in {layers} layers{f'; one for all tokens, {shared} wide' if shared else ''}"


def _head(card: dict[str, str]) -> str:
    """What the hub reads."""
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["yoco"]}
    if "license" in card:
        fields["license"] = card["license"]
    if "language" in card:
        fields["language"] = [language.strip() for language in card["language"].split(",")]
    return yaml.safe_dump(fields, sort_keys=False).strip()


def _evaluation(facts: dict[str, Any]) -> str:
    """A table of the validation losses; nothing where none is known."""
    if not facts.get("validation"):
        return ""
    lines = [
        f"| {name or 'of the run'} | {found['loss']:.4f} | {found['perplexity']:.2f} | {_bits(found)} |"
        for name, found in facts["validation"].items()
    ]
    at = f" at iteration {facts['evaluated_at']:,}" if facts.get("evaluated_at") else ""
    head = ["| validation data | loss (nats a token) | perplexity | bits per byte |", "|---|---|---|---|"]
    return "\n".join([f"## Evaluation{at}", "", *head, *lines, "", ""])


def _bits(found: dict[str, float]) -> str:
    return f"{found['bits-per-byte']:.4f}" if "bits-per-byte" in found else "not known"
