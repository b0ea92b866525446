"""How the rows of the model's fused weights are laid out, for optimizers that update each matrix as a whole."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.mixers import mixers_in
from yoco_megatron.mixers.record import FusedMatrix


def fused_matrices(config: Any) -> dict[str, FusedMatrix]:
    """By the name of the module that holds it; others hold one matrix. The names of the parts are those of an export.

    Args:
        config: a YOCOConfig, or the TransformerConfig of a GPTModel.
    Raises:
        ValueError: a self-decoder mixer that does not say.
    """
    matrices = [FusedMatrix("router", ("router",), is_logits=True)]
    matrices += [FusedMatrix("shared_experts", ("gate",), is_logits=True)]  # of all of them, if they have one
    if config.gated_linear_unit:
        matrices += [FusedMatrix("linear_fc1", ("gate_proj", "up_proj"), parts=(1, 1))]
    heads, kv_heads = config.num_attention_heads, config.num_query_groups
    sets = getattr(config, "shared_kv_sets", 0)
    if not sets:
        qkv = ("q_proj", "k_proj", "v_proj")
        return _by_name([*matrices, FusedMatrix("linear_qkv", qkv, kv_heads, (heads // kv_heads, 1, 1))])
    of_source = range(sets // len(sources_of(config)))
    kv = tuple(f"{name}.{number}" for number in of_source for name in ("k_proj", "v_proj"))
    matrices += [FusedMatrix("linear_kv", kv, kv_heads, (1,) * len(kv))]
    if config.num_self_decoder_layers:
        for mixer in mixers_in(config.self_decoder):  # whose matrices have names of their own
            matrices += mixer.require("fused", "an optimizer of whole matrices")(config)
    return _by_name(matrices)


def _by_name(matrices: list[FusedMatrix]) -> dict[str, FusedMatrix]:
    return {matrix.name: matrix for matrix in matrices}


def weights_of(model: nn.Module, config: Any) -> Iterator[tuple[Any, FusedMatrix]]:
    """(parameter, what it holds) of the model's weights in `fused_matrices`."""
    matrices = fused_matrices(config)
    for name, param in model.named_parameters():
        *_, module, own_name = name.split(".")
        # Experts in one grouped product: linear_fc1.weight0, linear_fc1.weight1, ...
        if param.dim() == 2 and module in matrices and re.fullmatch(r"weight\d*|gate_weight", own_name):
            yield param, matrices[module]


def group_rows(matrix: FusedMatrix, rows: int, tp_size: int) -> list[int]:
    """Rows of each part in one group, of a weight of which a rank holds so many rows.

    The groups follow one another: a weight [rows, h] is, for these sizes r, [rows / sum(r), sum(r), h].
    """
    groups = max(1, matrix.groups // tp_size)
    return [rows * part // (groups * sum(matrix.parts)) for part in matrix.parts]
