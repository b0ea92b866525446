"""Which model a checkpoint folder holds, in a small JSON beside the checkpoints: nothing needs to be unpickled.

Loading a checkpoint of another shape fails deep inside the distributed loader, after the GPUs are busy. The shape is
therefore written when training starts, and compared before it starts again.
"""

import json
import re
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

from yoco_megatron.checkpoint.layout import TRACKER, format_of, path_of, tracked_iteration
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.mixers import options_of_others
from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.small_files import BadFile, mismatch, read_json

FILE_NAME = "architecture.json"
ROUTING = {  # of experts; with Megatron's defaults
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
}
MAMBA = {field.name: field.default for field in fields(ModelShape) if field.name.startswith("mamba_")}
EXPERTS = {field.name: field.default for field in fields(ModelShape) if re.match("num_experts|moe_", field.name)}
# Flags that change the function but not the parameter shapes.
ROPE_SCALING = {"use_rope_scaling": False, "rope_scaling_factor": 8.0}
SWITCHES = ("rope_variant", "rotary_base", *ROPE_SCALING, "scale_embedding", "decay_temperature", *ROUTING)
# What older versions did not write, and how it was.
ALWAYS_WAS = {
    "shared_kv_sets": 1,
    "shared_kv_sources": None,
    "cross_decoder_pattern": None,
    "qk_layernorm": False,
    "add_qkv_bias": False,
    "mtp_num_layers": 0,
    "self_decoder_head_dim": None,  # followed from two others, see `read`
    **ROPE_SCALING,
    **MAMBA,
    **ROUTING,
    **EXPERTS,
}
# What may differ between a run and the checkpoint it resumes from.
FREE = {"seq_length", "rotary_base"}
FIX = "copy it again from the run, or remove it, and only Megatron compares the shapes"


class _Recorded(TypedDict):
    architecture: Literal["yoco", "transformer"]


def describe(args: Namespace) -> dict[str, object]:
    """Everything that decides which function the weights compute."""
    shape = asdict(ModelShape.from_args(args))
    del shape["num_queries"], shape["means_over"]  # of a step, and of costs: the weights are the same
    described = shape | {name: getattr(args, name) for name in SWITCHES}
    return json.loads(json.dumps(described))  # as it is read again: a tuple is a list there


def save(args: Namespace, folder: str) -> Path:
    """Write architecture.json into `folder`, atomically."""
    return write_atomically(Path(folder) / FILE_NAME, json.dumps(describe(args), indent=1) + "\n")


def read(folder: str | Path) -> dict[str, Any]:
    """What the architecture.json in `folder` says; {} without one. Raises BadFile for one that is damaged."""
    saved = read_json(Path(folder) / FILE_NAME, _Recorded, missing={}, fix=FIX)
    if not saved:
        return saved
    kinds = get_type_hints(ModelShape)
    for name in kinds.keys() & saved.keys():
        if wrong := mismatch(saved[name], kinds[name], repr(name)):
            raise BadFile(f"{Path(folder) / FILE_NAME} does not hold what it should: {wrong}: {FIX}")
    found = ALWAYS_WAS | saved
    if found["self_decoder_head_dim"] is None:
        hidden, heads = found.get("hidden_size"), found.get("self_decoder_heads")
        known = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
        found["self_decoder_head_dim"] = hidden // heads if known else 0
    return found


def check_loadable(args: Namespace) -> None:
    """Compare the model of the checkpoint that will be loaded with the flags.

    Layers of multi-token prediction may be new, or left out, where the flag says how many there are.

    Raises:
        ValueError: every field that differs, with both values. A folder without architecture.json (another program's
        checkpoint) passes; Megatron's own checks then apply.
    """
    flag, folder = source_of(args)
    if folder is None:
        return
    saved = read(folder)
    if not saved:
        return
    wanted = describe(args)
    lacking = sorted(wanted.keys() - saved.keys())
    if lacking:
        raise BadFile(f"{Path(folder) / FILE_NAME} says nothing of {lacking[0]}: {FIX}")
    ignored = (
        FREE
        | options_of_others(args.self_decoder)
        | ({"padded_vocab_size"} if wanted["padded_vocab_size"] is None else set())
        | ({"mtp_num_layers"} if args.mtp_num_layers is not None else set())  # see upstream/new_layers.py
    )
    different = [
        f"{name.replace('_', '-')} is {saved[name]} there, {wanted[name]} here"
        for name in wanted
        if name not in ignored and saved[name] != wanted[name]
    ]
    if different:
        rows = saved["padded_vocab_size"]
        padded = any(one.startswith("padded-vocab-size") for one in different)
        lost = "mtp_num_layers" not in ignored and bool(saved["mtp_num_layers"])
        raise ValueError(
            f"{flag} {folder} holds another model: {'; '.join(different)}. "
            "Use the config that it was trained with (resolved_config.yaml beside it), or another folder"
            + (" (--mtp-num-layers 0 goes on without these layers)" if lost else "")
            + (f" (of the same tokenizer: --padded-vocab-size {rows}, at any mesh)" if padded else "")
        )
    gained = (args.mtp_num_layers or 0) - saved["mtp_num_layers"]
    loads_optimizer = flag == "--load" and not (args.no_load_optim or args.finetune)
    if gained > 0 and loads_optimizer and (args.bf16 or args.fp16) and not args.use_distributed_optimizer:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers}: {flag} {folder} has {gained} fewer, and without "
            "--use-distributed-optimizer its optimizer state cannot be extended: add --no-load-optim to begin it anew"
        )


def check_format(args: Namespace) -> None:
    """Raises ValueError where the checkpoint that will be loaded has another format than --ckpt-format."""
    flag, source = source_of(args)
    if source is None:
        return
    folder = Path(source)
    iteration = args.ckpt_step or tracked_iteration(folder)
    path = folder / "release" if iteration is None else path_of(folder, iteration)
    found, given = format_of(path), args.ckpt_format
    # Megatron's loader of `torch` finds the other one, if told to; ours of `torch_dist` chooses among its own.
    if {found, given} == {"torch", "torch_dist"} and not (args.auto_detect_ckpt_format and found == "torch_dist"):
        raise ValueError(f"{flag} {folder}: {path.name} is in the format {found}: add --ckpt-format {found}")


def source_of(args: Namespace) -> tuple[str, str | None]:
    """(flag, folder) of the checkpoint that will be loaded."""
    if args.pretrained_checkpoint is not None and (args.load is None or _is_empty(args.load)):
        return "--pretrained-checkpoint", args.pretrained_checkpoint
    return "--load", args.load


def _is_empty(folder: str) -> bool:
    return not (Path(folder) / TRACKER).exists()


def check_checkpoint_exists(args: Namespace) -> None:
    """Reject a --load without a checkpoint, unless it is the folder of --save: Megatron would train from scratch.

    Raises:
        ValueError: no checkpoint in --load (another folder than --save) or --pretrained-checkpoint.
    """
    if args.load is not None and not _is_empty(args.load):
        return
    fresh = args.load is not None and args.save is not None and Path(args.load) == Path(args.save)
    for flag, folder in (("--pretrained-checkpoint", args.pretrained_checkpoint), ("--load", args.load)):
        if folder is None or (flag == "--load" and (fresh or args.pretrained_checkpoint)):
            continue
        if _is_empty(folder):
            raise ValueError(f"{flag} {folder} holds no checkpoint ({TRACKER} is missing): give the --save of that run")
