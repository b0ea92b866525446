"""What an optimizer keeps for a parameter, and what Muon computes in a step.

Bytes a parameter: fp32 weight 4, unless it is the training's own, and moments, Adam's two 8, that of Muon or Lion 4.
Muon and Lion have the matrices of layers alone; Adam has all else.
"""

from argparse import Namespace

from yoco_megatron.config.memory_units import memory_width
from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import Parts, stage_parameters

Matrices = dict[tuple[int, ...], float]
"""{(rows, columns): how many}, in the mean over layers with and without experts, and over mixers."""


def is_distributed(args: Namespace) -> bool:
    """Whether data-parallel ranks share the state. Validation moves the flag, for Muon and Lion."""
    return args.use_distributed_optimizer or getattr(args, "use_layer_wise_distributed_optimizer", False)


def bytes_of_a_parameter(args: Namespace, shape: ModelShape, parts: Parts) -> float:
    """Of the optimizer's state, in the mean over what a rank holds."""
    low = args.bf16 or args.fp16
    # With the precision-aware optimizer the fp32 weights are the bf16 ones and 16 bits more.
    # With another FP8 recipe than delayed scaling Megatron keeps them whole (optimizer_config.py).
    in_two_parts = args.use_precision_aware_optimizer and (not args.fp8 or args.fp8_recipe == "delayed")
    found = 8.0 + ((2 if in_two_parts else 4) if low else 0)
    if args.optimizer in MATRIX_OPTIMIZERS:
        in_matrices = sum(
            parts.get(kind, 0) * rows * columns * count
            for kind, matrices in layer_matrices(shape).items()
            for (rows, columns), count in matrices.items()
        )
        found -= 4 * in_matrices / stage_parameters(parts, shape)
    return found


def newton_schulz_flops(args: Namespace, shape: ModelShape, parts: Parts) -> float:
    """Of a step of Muon, for all that a pipeline rank holds; 0 for other optimizers.

    An iteration on a matrix [m, n], m <= n, is X X^T, its square and their product with X: 4 m^2 n + 2 m^3.
    """
    if args.optimizer != "muon":
        return 0.0
    return args.muon_num_ns_steps * sum(
        parts.get(kind, 0) * count * (4 * min(size) ** 2 * max(size) + 2 * min(size) ** 3)
        for kind, matrices in layer_matrices(shape).items()
        for size, count in matrices.items()
    )


def layer_matrices(shape: ModelShape) -> dict[str, Matrices]:
    """Of one layer of each kind of `layer_matmul_parameters`. Each part of a fused weight is a matrix of its own."""
    d, q, kv = shape.hidden_size, shape.num_attention_heads * shape.kv_channels, shape.kv_width // 2
    if shape.architecture == "transformer":
        return {"decoder": _sum([(q, d), (kv, d), (kv, d), (d, q)], _ffn(shape, "decoder"))}
    own = _ffn(shape, "self_decoder")
    for mixer, share in shape.mixers.items():
        logits = {name for matrix in mixer.fused(shape) if matrix.is_logits for name in matrix.names}
        own = _sum([size for name, size in mixer.tensors(shape).items() if name not in logits], own, share)
    ffn, share, memory = _ffn(shape, "cross_decoder"), shape.attention_share, memory_width(shape)
    cross = _sum([(q, d), (d, q)], ffn, share)
    if memory:
        cross = _sum([(memory, d), (d, memory)], cross, 1 - share)
    mtp = _sum([(d, 2 * d), (q, d), (d, q)], ffn)
    return {
        "self_decoder": own,
        "shared_kv": {(kv, d): 2.0 * shape.sets_of_source},
        "cross_decoder": cross,
        "mtp": {size: shape.mtp_num_layers * count for size, count in mtp.items()},
    }


def _ffn(shape: ModelShape, kind: str) -> Matrices:
    """Gate, up and down projection, each m x n or n x m, which costs the same."""
    share = shape.experts_share(kind)
    sizes = [(shape.ffn_hidden_size, 1 - share), (shape.moe_ffn_hidden_size, share * (shape.num_experts or 0))]
    sizes += [(shape.moe_shared_expert_intermediate_size, share)]
    found: Matrices = {}
    for width, count in sizes:
        if width and count:
            size = (width, shape.hidden_size)
            found[size] = found.get(size, 0) + 3 * count
    return found


def _sum(single: list[tuple[int, ...]], counted: Matrices, share: float = 1) -> Matrices:
    found = dict(counted)
    for size in single:
        found[size] = found.get(size, 0) + share
    return found
