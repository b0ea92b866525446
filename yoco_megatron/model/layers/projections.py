"""The large linear layers of the mixers: heads are split over tensor-parallel ranks; --add-qkv-bias gives biases."""

from megatron.core.transformer.module import MegatronModule
from torch.distributed import ProcessGroup

from yoco_megatron.model.yoco_config import YOCOConfig


def input_projection(
    linear: type, config: YOCOConfig, width: int, tp_group: ProcessGroup, bias: bool = False
) -> MegatronModule:
    """Column-parallel linear from hidden states to `width` values per token; each rank holds the rows of its heads."""
    return linear(
        config.hidden_size,
        width,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name="qkv",
        tp_group=tp_group,
    )


def output_projection(linear: type, config: YOCOConfig, width: int, tp_group: ProcessGroup) -> MegatronModule:
    """Row-parallel linear from all heads' `width` values per token to hidden states."""
    return linear(
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name="proj",
        tp_group=tp_group,
    )


def save_original_input(linear: MegatronModule) -> None:
    """FP8: save a linear layer's input for backward instead of its quantised copy (Transformer Engine only)."""
    from megatron.core.extensions.transformer_engine import set_save_original_input

    set_save_original_input(linear)
