"""Defaults that depend on another flag, filled in here and nowhere else.

YOCOConfig, the costs, the checks and the conversion all read sizes that went through `resolve_model`.
"""

from argparse import Namespace
from typing import Any

from yoco_megatron.config.loss_suffix import suffix_length
from yoco_megatron.config.memory_units import ATTENTION
from yoco_megatron.config.rules import OF_MEGATRONS_LOSS, require_divides, require_sizes
from yoco_megatron.mixers import of_layers, options_of_others
from yoco_megatron.mixers.mamba2 import default_heads
from yoco_megatron.utils.errors import require

LOSS_CHUNK_SIZE = 8192


def resolve_model(config: Any) -> None:
    """Give every size of a model that is None its value, in place; what has one keeps it.

    Args:
        config: a YOCOConfig, or flags in which `num_query_groups` None stands for no groups.
    Raises:
        ValueError: a size that cannot be derived, or a pattern of another length, naming the flag.
    """
    require_sizes(config)
    if getattr(config, "shared_kv_sets", 1) is None:
        config.shared_kv_sets = len(config.shared_kv_sources or [None])
    if config.num_query_groups is None:
        config.num_query_groups = config.num_attention_heads
    if config.kv_channels is None:
        require_divides(
            config.num_attention_heads, config.hidden_size, "--hidden-size", "--num-attention-heads", "change one"
        )
        config.kv_channels = config.hidden_size // config.num_attention_heads
    if config.ffn_hidden_size is None:
        # What Megatron chooses for SwiGLU: 8/3 x hidden, down to a multiple of 64.
        config.ffn_hidden_size = int((4 * config.hidden_size * 2 / 3) / 64) * 64
    if getattr(config, "num_experts", None) and config.moe_ffn_hidden_size is None:
        config.moe_ffn_hidden_size = config.ffn_hidden_size
    if config.architecture != "yoco":
        return
    if config.num_self_decoder_layers is None:
        require(
            config.num_layers % 2 == 0,
            f"--num-layers {config.num_layers} is odd, so it has no half: set --num-self-decoder-layers to choose the "
            "split",
        )
        config.num_self_decoder_layers = config.num_layers // 2
    config.self_decoder = of_layers(config.self_decoder, config.num_self_decoder_layers)
    if list(getattr(config, "shared_kv_sources", None) or ()) == [config.num_self_decoder_layers]:
        config.shared_kv_sources = None
    if set(getattr(config, "cross_decoder_pattern", None) or ()) == {ATTENTION}:
        config.cross_decoder_pattern = None
    if config.self_decoder_heads is None:
        config.self_decoder_heads = config.num_attention_heads
    if config.self_decoder_query_groups is None:
        config.self_decoder_query_groups = config.self_decoder_heads
    if getattr(config, "self_decoder_head_dim", None) is None:  # flags of an older run have none
        heads, fix = config.self_decoder_heads, "change one of them, or set --self-decoder-head-dim"
        require_divides(heads, config.hidden_size, "--hidden-size", "--self-decoder-heads", fix)
        config.self_decoder_head_dim = config.hidden_size // heads
    if getattr(config, "mamba_num_heads", 0) is None and "mamba_num_heads" not in options_of_others(
        config.self_decoder
    ):
        config.mamba_num_heads = default_heads(config.hidden_size, config.mamba_head_dim)
    if getattr(config, "rope_variant", None) == "yoco":
        config.rotary_interleaved = True


def resolved(args: Namespace) -> Namespace:
    """A copy of Megatron's arguments, before or after its own validation, with all sizes of the model resolved."""
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        require(getattr(args, dest) is not None, f"--{dest.replace('_', '-')} is missing: set it")
    flags = Namespace(**vars(args))
    if not args.group_query_attention:  # Megatron's own default for the groups is 1, which then means nothing
        flags.num_query_groups = None
    resolve_model(flags)
    flags.num_queries = computed_suffix(args)
    return flags


def computed_suffix(args: Namespace) -> int | None:
    """Last positions of a sequence at which cross-decoder, head and loss are computed; None for all.

    A Transformer can spare its head and loss; here where its output layer computes losses and has whole sequences.
    """
    if getattr(args, "loss_suffix", None) is None:  # flags of a model alone have none
        return None
    whole = args.context_parallel_size == 1 and not args.sequence_parallel
    if args.cross_decoder_positions == "all" or (args.architecture != "yoco" and not (args.loss_chunk_size and whole)):
        return None
    return suffix_length(args.loss_suffix, args.seq_length)


def queries_vary(args: Namespace) -> bool:
    """Whether each micro-batch computes other positions behind the shared K,V: where the data have masks of their own.

    A Transformer computes all of them.
    """
    return args.has_loss_masks and args.architecture == "yoco" and args.cross_decoder_positions == "loss"


def resolve_loss_chunk(config: Any) -> None:
    """Of YOCOConfig, or of the arguments of any architecture: chunks, unless the loss is to be Megatron's own."""
    if config.loss_chunk_size is None:
        megatrons_own = any(getattr(config, dest, False) for dest in OF_MEGATRONS_LOSS)
        config.loss_chunk_size = 0 if megatrons_own or config.architecture != "yoco" else LOSS_CHUNK_SIZE
