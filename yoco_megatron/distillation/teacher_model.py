"""The teacher on the student's mesh: a YOCO of window layers alone whose window is the sequence is a Transformer.

So it has the student's sequence parallelism, pipeline stages, context parallelism and packed documents, and its layers
are called as the student's.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from yoco_megatron import runtime
from yoco_megatron.mixers import SLIDING_WINDOW
from yoco_megatron.model.init import named_parameters
from yoco_megatron.model.yoco_block import YOCOBlock
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.query_shard import QueryShard
from yoco_megatron.parallel.pipeline.stages import Stage
from yoco_megatron.upcycling.teacher import Teacher


class TeacherBlock(YOCOBlock):
    """The teacher's layers, at the end of which only the student's queries are left."""

    def _cross_decoder(self, hidden_states: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
        *_, queries = args
        is_taken = self.stage.post_process and isinstance(queries, QueryShard)
        return queries.take(hidden_states) if is_taken else hidden_states, []


class TeacherModel(YOCOModel):
    """One process's part of the teacher: called without gradients, it returns its normalised hidden states [s, b, h].

    Before the last pipeline stage, what the next one gets.
    """

    block_class = TeacherBlock
    entries: int
    """Size of its vocabulary, which is padded here to that of the student."""

    def head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        """Normalised hidden states of all tokens of this context-parallel rank, for a head."""
        hidden_states = self.final_layernorm(hidden_states)
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        return hidden_states


def teacher_config(student: YOCOConfig, teacher: Teacher, window: int) -> YOCOConfig:
    """The student's configuration with the sizes of a teacher, for the same mesh and precision, but without FP8.

    Args:
        window: keys that a query attends to.
    """
    config, sizes = copy.copy(student), teacher.config
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    changed = dict(
        num_layers=sizes.num_hidden_layers,
        num_self_decoder_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=sizes.head_dim,
        self_decoder=SLIDING_WINDOW.name,
        self_decoder_heads=heads,
        self_decoder_head_dim=sizes.head_dim,
        self_decoder_query_groups=groups,
        self_decoder_window=window,
        cross_decoder_pattern=None,
        layernorm_epsilon=sizes.rms_norm_eps,
        qk_layernorm=teacher.qk_norm,
        add_qkv_bias=teacher.qkv_bias,
        rope_variant="standard",
        rotary_interleaved=False,
        **teacher.rope_scaling,
        scale_embedding=False,
        loss_chunk_size=0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        fp8=None,
        recompute_granularity=None,
        keep_cross_attention=False,
        gradient_accumulation_fusion=False,
        tp_comm_overlap=False,
        delay_wgrad_compute=False,
    )
    for name, value in changed.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def build(
    student: YOCOModel, teacher: Teacher, pg_collection: ProcessGroupCollection, vp_stage: int | None = None
) -> TeacherModel:
    """The part of the teacher beside `student`, with its weights: the same layers of as many, and both ends."""
    length = student.max_sequence_length
    config = teacher_config(student.config, teacher, min(length, teacher.window or length))
    stage = replace(student.stage, kv_sources=(), kv_in=range(0), kv_out=range(0))
    stage = replace(stage, memory_in=False, memory_out=False)
    if stage == Stage(0, student.config.num_layers):  # alone it may have another number of layers
        stage = replace(stage, last=config.num_layers)
    model = TeacherModel(
        config,
        student.vocab_size,
        length,
        rotary_base=teacher.rope_theta,
        stage=stage,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    model.entries = teacher.config.vocab_size
    load(model, teacher, pg_collection.tp.rank(), pg_collection.tp.size())
    if teacher.config.tie_word_embeddings and model.pre_process and model.post_process:
        model.output_layer.weight = model.embedding.word_embeddings.weight
    return model.to(runtime.device()).eval().requires_grad_(False)


@torch.no_grad()
def load(model: TeacherModel, teacher: Teacher, tp_rank: int, tp: int) -> None:
    """Read each parameter's part of the teacher's tensors, and nothing else of them."""
    for name, param in named_parameters(model):
        dim = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", False) else -1
        parts = [_part(teacher, source, dim, tp_rank, tp, param) for source in _sources(name, teacher.config)]
        if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):  # rows by K,V head: its queries, its key, its value
            groups = teacher.config.num_key_value_heads // tp
            value = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
        else:
            value = torch.cat(parts)
        assert value.shape[1:] == param.shape[1:], (name, value.shape, param.shape)
        param.zero_()[: len(value)] = value  # rows that pad the vocabulary are left


def _part(teacher: Teacher, name: str, dim: int, tp_rank: int, tp: int, param: Tensor) -> Tensor:
    """The part of a tensor that a tensor-parallel rank holds; all of it without a `dim`."""
    stored = teacher.tensors.files[name].get_slice(name)
    if dim < 0:
        return stored[:]
    size = stored.get_shape()[dim] // tp
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        size = param.shape[0]  # of the padded vocabulary
    start = min(tp_rank * size, stored.get_shape()[dim])
    stop = min(start + size, stored.get_shape()[dim])
    return stored[start:stop] if dim == 0 else stored[:, start:stop]


SOURCES = {
    "embedding.word_embeddings.weight": ("model.embed_tokens",),
    "final_layernorm.weight": ("model.norm",),
    "output_layer.weight": ("lm_head",),
    # In a layer; a norm has a place of its own, or is fused into what follows it.
    "input_layernorm.weight": ("input_layernorm",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm",),
    "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_qkv.bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2.weight": ("mlp.down_proj",),
}


def _sources(name: str, config: Any) -> Iterator[str]:
    """transformers' names of the tensors that a parameter is made of."""
    prefix = "model."
    if name.startswith("decoder.layers."):
        index, name = name.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{index}."
        end = ".bias" if name.endswith(".bias") else ".weight"
        yield from (f"{prefix}{source}{end}" for source in SOURCES[name])
    elif name == "output_layer.weight" and config.tie_word_embeddings:
        yield "model.embed_tokens.weight"
    else:
        yield from (f"{source}.weight" for source in SOURCES[name])
