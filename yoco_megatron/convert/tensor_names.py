"""Which tensors a YOCO has, and what each format calls them.

The names of the Hugging Face export are the canonical names: one unfused matrix per name, rows ordered by head.
Megatron fuses matrices that read the same input, rows grouped by head so that tensor parallelism cuts between heads;
fla and the authors' code rename only.
"""

from typing import Any

import torch
from torch import Tensor

from yoco_megatron.convert.config_fields import sizes
from yoco_megatron.mixers import get_mixer
from yoco_megatron.mixers.record import FusedMatrix, Shape


def shapes(config: Any) -> dict[str, Shape]:
    """Every tensor of the model that a YocoConfig describes, in the order of the forward pass; [out, in] for matrices.

    A tied head is the embedding, and has no entry.
    """
    h, ffn, split_layer = config.hidden_size, config.intermediate_size, config.num_self_decoder_layers
    q, kv = config.num_attention_heads * config.head_dim, _kv_heads_of_all_sets(config) * config.head_dim
    self_mixer = get_mixer(config.self_decoder).tensors(sizes(config))
    found: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for index in range(config.num_hidden_layers):
        if index == split_layer:
            kv_shapes: dict[str, Shape] = {"norm": (h,), "k_proj": (kv, h), "v_proj": (kv, h)}
            found |= {f"model.shared_kv.{name}.weight": shape for name, shape in kv_shapes.items()}
        mixer: dict[str, Shape] = {"q_proj": (q, h), "o_proj": (h, q)} if index >= split_layer else self_mixer
        mlp = {"gate_proj": (ffn, h), "up_proj": (ffn, h), "down_proj": (h, ffn)}
        layer: dict[str, Shape] = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        layer |= {f"mixer.{name}": shape for name, shape in mixer.items()}
        layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        found |= {f"{layer_name(config, index)}{name}.weight": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (h,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, h)
    return found


def _kv_heads_of_all_sets(config: Any) -> int:
    """Of the shared K,V: rows of their projections are ordered by head, and for one head by set."""
    return config.num_key_value_heads * config.shared_kv_sets


def layer_name(config: Any, index: int) -> str:
    """Prefix of layer `index` of the whole model."""
    split_layer = config.num_self_decoder_layers
    return f"model.self_layers.{index}." if index < split_layer else f"model.cross_layers.{index - split_layer}."


class Fused(FusedMatrix):
    """A tensor of Megatron's, and how it is taken apart."""

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """The separate tensors, contiguous copies of whole [rows, ...]."""
        if len(self.names) == 1:
            return {self.names[0]: whole}
        by_head = whole.unflatten(0, (self.groups, sum(self.parts), -1))
        parts = by_head.split(self.parts, dim=1)
        return {name: part.flatten(0, 2).contiguous() for name, part in zip(self.names, parts)}

    def join(self, separate: list[Tensor]) -> Tensor:
        """What `split` took apart."""
        if len(self.names) == 1:
            return separate[0]
        by_head = [tensor.unflatten(0, (self.groups, part, -1)) for tensor, part in zip(separate, self.parts)]
        return torch.cat(by_head, dim=1).flatten(0, 2)

    def shape(self, shapes: dict[str, Shape]) -> Shape:
        """Shape of the whole, from those of the separate tensors."""
        return (sum(shapes[name][0] for name in self.names), *shapes[self.names[0]][1:])


def megatron(config: Any) -> list[Fused]:
    """Every tensor of a training checkpoint, whole, as one process has it and as every mesh saves it."""
    mixer = get_mixer(config.self_decoder)
    entries = [Fused("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
    for index in range(config.num_hidden_layers):
        ours, theirs = layer_name(config, index), f"decoder.layers.{index}."

        def add(name: str, *names: str, groups: int = 1, parts: Shape = (1,), ours=ours, theirs=theirs) -> None:
            entries.append(Fused(f"{theirs}{name}", tuple(f"{ours}{n}.weight" for n in names), groups, parts))

        cross = index >= config.num_self_decoder_layers
        fused = [FusedMatrix("linear_q", ("q_proj",))] if cross else mixer.fused(sizes(config))
        fused_norm = "linear_q" if cross else mixer.fused_norm
        norm = f"self_attention.{fused_norm}.layer_norm_weight" if fused_norm else "input_layernorm.weight"
        add(norm, "input_layernorm")
        for matrix in fused:
            names = [f"mixer.{name}" for name in matrix.names]
            add(f"self_attention.{matrix.name}.weight", *names, groups=matrix.groups, parts=matrix.parts)
        add("self_attention.linear_proj.weight", "mixer.o_proj")
        add("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm")
        add("mlp.linear_fc1.weight", "mlp.gate_proj", "mlp.up_proj", parts=(1, 1))
        add("mlp.linear_fc2.weight", "mlp.down_proj")
    kv = ("model.shared_kv.k_proj.weight", "model.shared_kv.v_proj.weight")
    entries += [
        Fused("decoder.shared_kv.linear_kv.layer_norm_weight", ("model.shared_kv.norm.weight",)),
        Fused("decoder.shared_kv.linear_kv.weight", kv, _kv_heads_of_all_sets(config), (1, 1)),
        Fused("final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        entries.append(Fused("output_layer.weight", ("lm_head.weight",)))
    return entries


# What the others call a part of a name; the first that fits is taken.
FLA = {
    "model.embed_tokens.": "model.embeddings.",
    "model.shared_kv.norm.": "model.shared_kv_builder.kv_norm.",
    "model.shared_kv.": "model.shared_kv_builder.",
    ".mixer.decay_proj.": ".attn.gk_proj.",
    ".mixer.": ".attn.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}
OFFICIAL = {
    "model.embed_tokens.": "embed_tokens.",
    "model.norm.": "layer_norm.",
    "lm_head.": "output_projection.",
    "model.shared_kv.norm.": "cross_decoder.kv_layer_norm.",
    "model.shared_kv.": "cross_decoder.",
    ".mixer.decay_proj.": ".mixer.gt_proj.",
    ".mixer.o_proj.": ".mixer.out_proj.",
    ".input_layernorm.": ".mixer_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    # silu is on fc1 there, not on what is called gate
    ".mlp.gate_proj.": ".ffn.fc1.",
    ".mlp.up_proj.": ".ffn.gate.",
    ".mlp.down_proj.": ".ffn.fc2.",
    "model.self_layers.": "self_decoder.layers.",
    "model.cross_layers.": "cross_decoder.layers.",
}


def fla(name: str) -> str:
    """fla's name (YOCOForCausalLM of flash-linear-attention) of one of our tensors."""
    for ours, theirs in FLA.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def official(name: str) -> str:
    """The name in the authors' checkpoint.pth."""
    for ours, theirs in OFFICIAL.items():
        name = name.replace(ours, theirs)
    return name
