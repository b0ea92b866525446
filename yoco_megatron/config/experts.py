"""Mixture of experts (--num-experts) in place of the SwiGLU of layers: which layers have them, and what they obey.

The layer is Megatron's. Routing has to be causal: a token's experts depend on that token alone. What would let them
depend on later tokens, sinkhorn and dropping what exceeds an expert's capacity, is refused (flags.yaml).
"""

import ast
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from yoco_megatron.config.resolve import queries_vary
from yoco_megatron.config.rules import require_divides
from yoco_megatron.utils.errors import require

MOST_LAYERS = 10_000  # of a pattern; a typing error must not fill the memory


def layers_with_experts(num_experts: int | None, moe_layer_freq: int | Sequence[int], num_layers: int) -> list[bool]:
    """For each layer of the model, self-decoder first, whether it has experts.

    Args:
        moe_layer_freq: every how many layers, beginning with the first, or 0 or 1 for each of them (--moe-layer-freq).
    """
    if not num_experts:
        return [False] * num_layers
    if isinstance(moe_layer_freq, int):
        return [index % moe_layer_freq == 0 for index in range(num_layers)]
    return [bool(has) for has in moe_layer_freq]


def layer_freq(text: str) -> int | list[int]:
    """--moe-layer-freq as it is written: a number, or a pattern such as [0]+[1]*25. Raises ValueError."""
    try:
        found = _pattern(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # of a text so long or so deep, or no text
        found = None
    require(found is not None, f"--moe-layer-freq {text!r:.60} is no number, and no pattern such as [0]+[1]*25")
    assert found is not None
    return found


def _pattern(node: ast.expr) -> int | list[int] | None:
    """A number, a list, lists that are added, a list and a number that are multiplied; None for all else."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.List):
        found = [_pattern(one) for one in node.elts]
        return [one for one in found if isinstance(one, int)] if all(isinstance(one, int) for one in found) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _pattern(node.left), _pattern(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right if len(left) + len(right) <= MOST_LAYERS else None
    if isinstance(node.op, ast.Mult) and isinstance(left, int) and isinstance(right, list):
        left, right = right, left
    if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
        return left * right if len(left) * right <= MOST_LAYERS else None
    return None


def are_balanced(config: Any) -> bool:
    """Whether a loss or a bias keeps them from a router that takes the same few."""
    losses = zip(_list(config.moe_router_load_balancing_type), _list(config.moe_aux_loss_coeff))
    return config.moe_router_enable_expert_bias or any(kind != "none" and weight for kind, weight in losses)


def check_sizes(config: Any) -> None:
    """Rules of the sizes. `config` has the fields of ModelShape. Raises ValueError."""
    if config.num_experts is None:
        return
    require(config.num_experts >= 1, f"--num-experts {config.num_experts} must be at least 1")
    for dest in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        size = getattr(config, dest)
        require(size is None or size >= 1, f"--{dest.replace('_', '-')} {size} must be at least 1")
    require(
        1 <= config.moe_router_topk <= config.num_experts,
        f"--moe-router-topk {config.moe_router_topk} must lie between 1 and --num-experts {config.num_experts}",
    )
    each = config.moe_layer_freq
    if isinstance(each, int):
        require(each >= 1, f"--moe-layer-freq {each} must be at least 1: every how many layers there are experts")
    else:
        require(
            len(each) == config.num_layers and any(each) and set(each) <= {0, 1},
            f"--moe-layer-freq {list(each)!s:.80} must be 0 or 1 for each of --num-layers {config.num_layers}, and 1 "
            "for one at least",
        )


def check_model(config: Any) -> None:
    """Rules of the sizes, of the mesh and of what does not go with experts. `config`: a YOCOConfig, or arguments."""
    check_sizes(config)
    if config.num_experts is None:
        return
    tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    etp = config.expert_tensor_parallel_size or tp
    for flag, size in (("--expert-model-parallel-size", ep), ("--expert-tensor-parallel-size", etp)):
        require(size >= 1, f"{flag} {size} must be at least 1")
    require_divides(
        ep, config.num_experts, "--num-experts", "--expert-model-parallel-size", "each rank holds as many experts"
    )
    width = config.moe_ffn_hidden_size or config.ffn_hidden_size
    split = "--expert-tensor-parallel-size splits an expert"
    require_divides(etp, width, "--moe-ffn-hidden-size", "--expert-tensor-parallel-size", split)
    require_divides(
        tp,
        config.moe_shared_expert_intermediate_size or tp,
        "--moe-shared-expert-intermediate-size",
        "--tensor-model-parallel-size",
        "it is split like any FFN",
    )
    require(
        tp == 1 or config.sequence_parallel,
        f"--num-experts with --tensor-model-parallel-size {tp} needs --sequence-parallel: every rank would route all "
        "tokens",
    )
    for flag, asked in (
        ("--recompute-elementwise", config.recompute_elementwise),
        ("--mlp-chunks-for-training", config.mlp_chunks_for_training > 1),
        ("--fp8-format", config.fp8),
    ):
        require(not asked, f"{flag} is not built for --num-experts: remove one of them")
    balanced = any(_list(config.moe_aux_loss_coeff)) or config.moe_z_loss_coeff
    require(
        not (balanced and config.calculate_per_token_loss),
        "--calculate-per-token-loss does not go with --moe-aux-loss-coeff and --moe-z-loss-coeff, which Megatron then "
        "scales by the tokens of each layer, and a cross-decoder may have fewer: remove it",
    )


def check_run(args: Namespace) -> None:
    """Rules of the arguments of a run of any architecture. Raises ValueError."""
    if args.num_experts is None:
        require(
            args.expert_model_parallel_size == 1,
            f"--expert-model-parallel-size {args.expert_model_parallel_size} has no effect without --num-experts",
        )
        return
    pp, ep = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    require(
        args.world_size % (pp * ep * etp) == 0,
        f"{args.world_size} processes cannot be divided into --pipeline-model-parallel-size {pp} x "
        f"--expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp}: change one of them",
    )
    if args.architecture != "yoco":
        require(
            args.transformer_impl != "local",
            "--num-experts of --architecture transformer is built with the layers of Transformer Engine alone",
        )
        return
    balancing, coefficients = _list(args.moe_router_load_balancing_type), _list(args.moe_aux_loss_coeff)
    require(
        len(balancing) == len(coefficients),
        f"--moe-router-load-balancing-type has {len(balancing)} values, --moe-aux-loss-coeff {len(coefficients)}: "
        "give one for each",
    )
    require(
        args.moe_token_dispatcher_type != "allgather" or ep * etp == 1 or not queries_vary(args),
        "--moe-token-dispatcher-type allgather needs as many tokens on each rank, and data with loss masks have others "
        "in each sample: use alltoall",
    )
    for flag, asked in (
        ("--teacher", args.teacher is not None),
        ("--cuda-graph-impl", args.cuda_graph_impl != "none"),
    ):
        require(not asked, f"{flag} is not built for --num-experts: remove one of them")


def refuse(config: Any, what: str) -> None:
    """Raise ValueError if the model has experts, which `what` is not built for."""
    require(
        config.num_experts is None, f"--num-experts {config.num_experts}: {what} is not built for mixtures of experts"
    )


def _list(value: Any) -> list:
    """A value that Megatron keeps alone if there is one."""
    return value if isinstance(value, list) else [value]
