"""Optimizers that update a matrix as a whole (--optimizer muon): which matrices, and where a fused weight is cut.

Adam has what is no such matrix: embedding, output layer, norms and biases, by Megatron's rule; and by ours the matrices
of logits, the retention's decay and the routers of experts, whose rows have nothing to do with each other.
"""

from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.utils import get_model_config

from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.model.fused_matrices import group_rows, weights_of
from yoco_megatron.upstream.registry import relies_on, replaces

IS_LOGITS = "is_logits"


@replaces(
    "megatron.core.optimizer",
    "_get_param_groups",
    digest="c11dee3163ac8a5d",
    calls=2,
    why="its caller splits linear_qkv by the heads of the cross-decoder, which those of the self-decoder may not be, "
    "and splits no other fused weight",
)
def get_param_groups(model_chunks: list, config: Any, config_overrides: dict | None) -> list[dict]:
    """With our own splits, and Adam for logits."""
    if config.optimizer not in MATRIX_OPTIMIZERS:
        return get_param_groups.original(model_chunks, config, config_overrides)
    for chunk in model_chunks:
        model_config = get_model_config(chunk)
        for param, matrix in weights_of(chunk, model_config):
            if len(matrix.parts) > 1:
                tp_size = model_config.tensor_model_parallel_size
                param.is_qkv, param.qkv_split_shapes = True, group_rows(matrix, param.shape[0], tp_size)
            setattr(param, IS_LOGITS, matrix.is_logits)
    scalar = config.muon_scalar_optimizer if config.optimizer == "muon" else "adam"
    logits = {ParamKey(predicate=ParamPredicate(IS_LOGITS, lambda param: getattr(param, IS_LOGITS, False))):
              {"optimizer": scalar}}  # fmt: skip
    return get_param_groups.original(model_chunks, config, (config_overrides or {}) | logits)


relies_on(
    "megatron.core.optimizer",
    "_get_megatron_emerging_optimizer",
    digest="01b04ce93bbbe12a",
    used_by="upstream/matrix_optimizers.py",
    why="_get_param_groups: it is called behind Megatron's own splits and before any copy of a parameter",
)
relies_on(
    "megatron.core.optimizer.emerging_optimizers",
    "TensorParallelMuon.orthogonalize",
    digest="c2c00565b97707d4",
    used_by="upstream/matrix_optimizers.py",
    why="is_qkv and qkv_split_shapes: what it makes of them",
)


@replaces(
    "megatron.training.training",
    "tag_params_for_buffer_routing",
    digest="6004483f42321ed3",
    calls=1,
    why="the distributed optimizer keeps whole the matrices that Muon updates, and decides by shape alone",
)
def tag_params_for_buffer_routing(model_chunks: list) -> None:
    """With matrices of logits among those of Adam."""
    tag_params_for_buffer_routing.original(model_chunks)
    for chunk in model_chunks:
        for param, matrix in weights_of(chunk, get_model_config(chunk)):
            if matrix.is_logits:
                param.is_managed_by_layer_wise_optimizer = False


@replaces(
    "megatron.core.optimizer.emerging_optimizers",
    "_default_adam_based_eopt_config_to_kwargs",
    digest="39cc2ef7b76a60bc",
    calls=1,
    why="it gives Lion the betas of Adam, and --lion-beta1 and --lion-beta2 have no effect",
)
def default_adam_based_eopt_config_to_kwargs(
    eopt_name: str, config: Any, model_chunks: list, pg_collection: Any
) -> dict[str, Any]:
    """With Lion's own betas."""
    kwargs = default_adam_based_eopt_config_to_kwargs.original(eopt_name, config, model_chunks, pg_collection)
    return kwargs | ({"betas": (config.lion_beta1, config.lion_beta2)} if eopt_name == "lion" else {})
