"""A trained model from its checkpoint folder, in one process, whatever mesh it was trained on."""

import dataclasses
import os
from argparse import Namespace
from pathlib import Path
from typing import TypedDict

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron

from yoco_megatron.checkpoint import architecture, safe_unpickling
from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.config.yaml_files import load_config_file, to_argv
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.mixers import MIXERS
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.startup import arguments
from yoco_megatron.startup.parser import build_parser
from yoco_megatron.upstream import quiet
from yoco_megatron.utils.ports import free_port
from yoco_megatron.utils.small_files import BadFile, read_json


class _Rows(TypedDict):
    padded_vocab_size: int


# Of a run's config only these arguments are taken: which function the weights compute, in which precision, and how text
# became tokens. The folder may be a stranger's: what else a run reads, writes or executes is not for it to say.
TAKEN = {field.name for field in dataclasses.fields(YOCOFields)} | {
    *(option for mixer in MIXERS.values() for option in mixer.options),
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
    *(
        "num_query_groups",
        "kv_channels",
        "seq_length",
        "max_position_embeddings",
        "untie_embeddings_and_output_weights",
    ),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_freq"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor", "window_size"),
    *(
        "normalization",
        "layernorm_epsilon",
        "norm_epsilon",
        "layernorm_zero_centered_gamma",
        "add_bias_linear",
        "add_qkv_bias",
    ),
    *("swiglu", "squared_relu", "quick_geglu", "openai_gelu", "qk_layernorm", "qk_l2_norm", "softmax_type"),
    "mtp_num_layers",
    *("window_attn_skip_freq", "attention_output_gate", "glu_linear_offset", "activation_func_clamp_value"),
    *("bf16", "fp16", "fp32_residual_connection", "attention_softmax_in_fp32", "apply_query_key_layer_scaling"),
    *(*architecture.EXPERTS, *architecture.ROUTING, "moe_router_dtype", "moe_token_dispatcher_type"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "vocab_extra_ids"),
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "special_tokens"),
    *("tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens", "tokenizer_sentencepiece_legacy"),
    *("tiktoken_pattern", "tiktoken_num_special_tokens", "null_tokenizer_eod_id", "null_tokenizer_pad_id"),
}
# What one process that reads the result says itself.
READING = {
    "micro-batch-size": 1,
    "global-batch-size": 1,
    "skip-train": True,
    "no-load-optim": True,
    "no-load-rng": True,
    "exit-on-missing-checkpoint": True,
    # What this machine has may be less than what the run had.
    "retention-backend": None,
}


def parse_run(folder: str, iteration: int | None = None, **more: object) -> Namespace:
    """The arguments with which one process reads the run in `folder` (its --save); `more` are flags that win.

    Raises:
        ValueError: no checkpoint of pretrain_yoco.py there, or a config that describes no model.
    """
    config = Path(folder) / RESOLVED
    if not config.exists():
        raise ValueError(f"--load {folder}: no resolved_config.yaml there; give the folder that training had as --save")
    parser = build_parser()
    dests = {name: action.dest for name, action in parser._option_string_actions.items()}
    recorded = {name: value for name, value in load_config_file(config).items() if dests.get(f"--{name}") in TAKEN}
    own = READING | {"load": folder, "ckpt-step": iteration} | more
    try:
        return arguments.parse(to_argv(recorded | own, parser), reading=True)
    except ValueError as error:
        raise BadFile(f"{config} describes no model that can be read: {error}") from error


def load_model(folder: str, iteration: int | None = None, **more: object) -> tuple[MegatronModule, Namespace]:
    """As `load_model_chunks`, for one process, which holds the whole model."""
    (model,), args = load_model_chunks(folder, iteration, **more)
    return model, args


def load_model_chunks(
    folder: str, iteration: int | None = None, **more: object
) -> tuple[list[MegatronModule], Namespace]:
    """Load the checkpoint in `folder` (the run's --save), the latest or the given iteration; its tokenizer is not used.

    Args:
        more: flags that win over the run's, such as those of a mesh of several processes.
    Returns:
        (this process's chunks of the model, in evaluation mode; Megatron's arguments).
    Raises:
        ValueError: no checkpoint of pretrain_yoco.py there.
    """
    rows = read_json(Path(folder) / architecture.FILE_NAME, _Rows)["padded_vocab_size"]
    if architecture.read(folder).get("mtp_num_layers"):
        more["mtp-num-layers"] = 0  # they are for training, and a run may have gained them after this checkpoint
    tokenizer = {"tokenizer-type": "NullTokenizer", "tokenizer-model": None, "vocab-size": rows}
    args = parse_run(folder, iteration, **{"padded-vocab-size": rows, **tokenizer, **more})
    set_environment_of_one_process()
    with quiet.quietly():
        args = arguments.finalize(args)
        safe_unpickling.check_installed()
        initialize_megatron()
        model_config = model_config_from_args(args)
        builder = model_config.get_builder_cls()(model_config)
        models = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        load_checkpoint(models, None, None)
    return [model.eval() for model in unwrap_model(models)], args


def set_environment_of_one_process() -> None:
    """The environment that torchrun would set for one process."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        os.environ.setdefault(name, str(value))
