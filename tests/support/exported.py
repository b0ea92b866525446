"""The Hugging Face twin of a model that this process holds."""

from typing import Any

import torch

from support.models import plain_name
from yoco_megatron.convert import config_fields, tensor_names
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.speculative import attach
from yoco_megatron.model.init import named_parameters
from yoco_megatron.model.yoco_model import YOCOModel


def small_config(self_decoder: str, **more: Any) -> YocoConfig:
    """Of a model of four layers, width 32, with weights that let logits differ."""
    fields = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        self_decoder_heads=2,
        sliding_window=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_state_dim=8,
        mamba_num_groups=2,
        initializer_range=0.2,
    )
    return YocoConfig(self_decoder=self_decoder, **fields | more)


def twin_config(model: YOCOModel, **more: Any) -> YocoConfig:
    """Its configuration, from the trainer's."""
    config = model.config
    known = {"vocab_size": model.vocab_size, "rope_theta": 10000, "max_position_embeddings": model.max_sequence_length}
    fields = config_fields.arguments_of(config)
    same = {name: getattr(config, theirs) for name, theirs in fields.items() if name not in known}
    return YocoConfig(**known, **same, tie_word_embeddings=model.share_embeddings_and_output_weights, **more)


def _stacked(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a checkpoint stacks of single experts."""
    before, after = name.split(".experts.experts.")
    experts = [key for key in state if key.startswith(f"{before}.experts.local_experts.") and key.endswith(after)]
    return torch.stack([state[key] for key in experts])


def twin(model: YOCOModel, **more: Any) -> YocoForCausalLM:
    """A transformers model of the same weights and dtype, in evaluation mode, with its layers for --speculative."""
    config = twin_config(model, **more)
    state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    state |= {name: value.detach() for name, value in named_parameters(model)}  # layers by their number in the model
    weights = {}
    for entry in tensor_names.megatron(config):
        name = plain_name(entry.name)  # without Transformer Engine
        weights |= entry.split(state[name] if name in state else _stacked(state, name))
    twin = YocoForCausalLM(config)
    attach(twin)
    twin.to(model.config.params_dtype)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    twin.tie_weights()
    return twin.eval()


def model_that_drafts(kind: str, layers: int) -> YocoForCausalLM:
    """Of few tokens and large weights, so that its text varies and random drafts are at times right."""
    torch.manual_seed(4)
    config = small_config(kind, vocab_size=3, mtp_num_layers=layers, initializer_range=0.5)
    model = YocoForCausalLM(config)
    attach(model)
    for layer in model.model.mtp_layers:
        layer.apply(model._init_weights)
    return model.double().eval()
