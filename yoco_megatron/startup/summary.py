"""What a run is, in a dozen lines before its first step."""

from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from yoco_megatron import __version__, runtime
from yoco_megatron.checkpoint.architecture import source_of
from yoco_megatron.checkpoint.layout import tracked
from yoco_megatron.config.memory_units import attention_layers
from yoco_megatron.config.resolve import queries_vary, resolved
from yoco_megatron.costs.flops import forward_flops_per_token
from yoco_megatron.costs.shape import ModelShape, active_parameters, parameter_count
from yoco_megatron.mixers import mixers_in
from yoco_megatron.model.cross_decoder.travelling_queries import queries_travel, received_by_cross_attention
from yoco_megatron.training.query_positions import query_runs
from yoco_megatron.utils.units import in_words, with_unit

WIDTH = 10


def summary(args: Namespace) -> str:
    """Model, machine, batch, data, schedule and folders of a run with Megatron's validated arguments, a line each."""
    return "\n".join(f"{name:<{WIDTH}}{text}" for name, text in _lines(args))


def _lines(args: Namespace) -> Iterator[tuple[str, str]]:
    shape = ModelShape.from_args(args)
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    yield "yoco", f"{__version__}; {packages}; {args.world_size} {_device(args.world_size)}"
    yield (
        "model",
        f"{_parameters(shape)}: {_layers(args, shape)}, vocabulary {args.padded_vocab_size:,}",
    )
    flops = 3 * sum(forward_flops_per_token(shape).values())
    yield "", f"{with_unit(flops, 'FLOP')} a token to train, causal, {_precision(args)}"
    yield from (("", note) for note in positions(args))
    sizes = {
        "data": args.data_parallel_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
    }
    if args.num_experts:
        sizes |= {"experts": args.expert_model_parallel_size, "inside experts": args.expert_tensor_parallel_size}
    yield "mesh", ", ".join(f"{name} {size}" for name, size in sizes.items())
    tokens = args.global_batch_size * args.seq_length
    yield (
        "batch",
        (
            f"{args.global_batch_size:,} sequences of {args.seq_length:,} = {in_words(tokens)} tokens a step; "
            f"{args.micro_batch_size} a micro-batch"
        ),
    )
    yield "data", _data(args)
    if args.train_iters and not args.skip_train:
        yield (
            "schedule",
            (
                f"{args.train_iters:,} steps, {in_words(args.train_iters * tokens)} tokens; learning rate "
                f"{args.lr:g} to {args.min_lr:g}, {args.lr_decay_style}; evaluation every {args.eval_interval:,} steps"
            ),
        )
    if args.load or args.pretrained_checkpoint:
        yield "from", _origin(args)
    if args.save and not args.skip_train:
        when = f"every {args.save_interval:,} steps" if args.save_interval < (args.train_iters or 0) else "at the end"
        yield "saves", f"{args.save} {when}"
    if args.tensorboard_dir:
        yield "curves", f"tensorboard --logdir {args.tensorboard_dir}"


def _device(count: int) -> str:
    if runtime.has_gpu():
        return f"x {torch.cuda.get_device_name()}"
    return "CPU process" if count == 1 else "CPU processes"


def _layers(args: Namespace, shape: ModelShape) -> str:
    if args.architecture == "transformer":
        return f"Transformer, {shape.num_layers} layers, width {shape.hidden_size:,}"
    sets = f" over {shape.shared_kv_sets} sets of K,V" if shape.shared_kv_sets > 1 else ""
    if shape.shared_kv_sources:
        sets += f" of layers {', '.join(map(str, shape.shared_kv_sources))}"
    number = shape.num_cross_decoder_layers - attention_layers(shape)
    units = f" and {number} gated memory unit{'s' * (number > 1)}" if number else ""
    mixers = " and ".join(mixer.name.replace("_", " ") for mixer in mixers_in(shape.self_decoder))
    return (
        f"YOCO, {shape.num_self_decoder_layers} layers of {mixers} and "
        f"{attention_layers(shape)} of cross attention{sets}{units}, width {shape.hidden_size:,}"
    )


def _parameters(shape: ModelShape) -> str:
    count = f"{sum(parameter_count(shape).values()):,} parameters"
    if not shape.num_experts:
        return count
    chosen = f"{shape.moe_router_topk} of {shape.num_experts} experts"
    return f"{count}, {active_parameters(shape):,} of them active with {chosen}"


def _precision(args: Namespace) -> str:
    if args.fp8:
        return f"fp8 ({args.fp8}, {args.fp8_recipe})"
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _data(args: Namespace) -> str:
    if args.mock_data:
        return "mock"
    paths = args.data_path or args.train_data_path or [args.data_args_path or args.per_split_data_args_path]
    shown = " ".join(map(str, paths[:4])) + (f" and {len(paths) - 4} more words" if len(paths) > 4 else "")
    return f"{shown}{f', split {args.split}' if args.split else ''}"


def _origin(args: Namespace) -> str:
    flag, folder = source_of(args)
    assert folder is not None, "asked where there is a folder"
    try:
        said = tracked(Path(folder))
    except ValueError:
        said = None
    if said is None:
        return f"random weights: {folder} has no checkpoint"
    if flag == "--pretrained-checkpoint":
        return f"the weights of {folder}, checkpoint {said}"
    return f"{folder}, checkpoint {args.ckpt_step or said}"


def positions(args: Namespace) -> list[str]:
    """Where the cross-decoder is computed, if not everywhere."""
    shape = ModelShape.from_args(args)
    if shape.num_queries is not None:
        where = f"cross-decoder, head and loss at the last {shape.num_queries:,} of {args.seq_length:,} positions"
        return [where, *_exchange(args)]
    if queries_vary(args):
        return ["cross-decoder, head and loss where the data have a loss; FLOPs are those of all positions"]
    return []


def _exchange(args: Namespace) -> list[str]:
    """What context-parallel ranks exchange for cross attention, and what the other way would cost, at few positions."""
    runs, ranks = query_runs(args), args.context_parallel_size
    varying = queries_vary(args) or args.dataloader_inter_document_masking
    if args.architecture != "yoco" or runs is None or ranks == 1 or varying:
        return []
    sizes = resolved(args)
    sizes.num_cross_decoder_layers = sizes.num_layers - sizes.num_self_decoder_layers
    travel = queries_travel(sizes, ranks, args.seq_length, runs, runtime.device())
    received = received_by_cross_attention(sizes, ranks, args.seq_length, runs)
    keys, queries = (
        f"{received[way] * args.micro_batch_size / args.tensor_model_parallel_size / 1e6:,.1f} MB"
        for way in ("keys", "queries")
    )
    chosen, other = (f"queries, {queries}", f"keys: {keys}") if travel else (f"keys, {keys}", f"queries: {queries}")
    return [f"cross attention: ranks exchange {chosen} a micro-batch ({other})"]
