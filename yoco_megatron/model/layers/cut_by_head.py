"""Parameters of heads or channels that sit in no linear layer: tensor parallelism cuts their first dimension."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch.distributed import ProcessGroup

from yoco_megatron.model.yoco_config import YOCOConfig


class CutByHead(MegatronModule):
    """A module of which each tensor-parallel rank holds a part of every parameter of its own, made by `parameter`."""

    def __init__(self, config: YOCOConfig, tp_group: ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group

    def parameter(self, whole: int, *others: int) -> torch.nn.Parameter:
        """This rank's part of a parameter [whole, *others], uninitialised, in the dtype of the model's parameters."""
        shape = (whole // self.tp_group.size(), *others)
        made = torch.nn.Parameter(
            torch.empty(shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(made, True, 0, 1)
        return made

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, which takes a module's own parameters for copies of each other."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        of_own = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | of_own
