"""The Hugging Face twin of a model that this process holds."""

from typing import Any

import torch

from yoco_megatron.checkpoint import fields, names
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.model.yoco_model import YOCOModel


def twin_config(model: YOCOModel, **more: Any) -> YocoConfig:
    """Its configuration, from the trainer's."""
    config = model.config
    known = {"vocab_size": model.vocab_size, "rope_theta": 10000, "max_position_embeddings": model.max_sequence_length}
    same = {name: getattr(config, theirs) for name, theirs in fields.SAME.items() if name not in known}
    return YocoConfig(**known, **same, tie_word_embeddings=model.share_embeddings_and_output_weights, **more)


def twin(model: YOCOModel, **more: Any) -> YocoForCausalLM:
    """A transformers model of the same weights and dtype, in evaluation mode."""
    config = twin_config(model, **more)
    state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    # One process without Transformer Engine has its norms apart from the linear layers that they feed.
    aside = {
        "self_attention.linear_q.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "shared_kv.linear_kv.layer_norm_weight": "shared_kv.layernorm.weight",
    }

    def found(name: str) -> torch.Tensor:
        for fused, apart in aside.items():
            if name.endswith(fused):
                return state[name.replace(fused, apart)]
        return state[name]

    weights = {}
    for entry in names.megatron(config):
        weights |= entry.split(found(entry.name))
    twin = YocoForCausalLM(config).to(model.config.params_dtype)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    twin.tie_weights()
    return twin.eval()
