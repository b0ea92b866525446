"""Transformer Engine's FusedAdam on fake tensors: what it keeps for each parameter; a step computes nothing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Arguments and methods are those that Megatron-Core uses (core/optimizer)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        store_param_remainders: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.master_weights = master_weights
        self.master_weight_dtype, self.store_param_remainders = master_weight_dtype, store_param_remainders

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        """The moments; and the weight in fp32, of which a bf16 weight has the upper half already."""
        state = self.state[parameter]
        for name, dtype in self.dtypes.items():
            state[name] = torch.empty(parameter.shape, dtype=dtype)
        if self.master_weights:
            has_upper_half = self.store_param_remainders and parameter.dtype == torch.bfloat16
            dtype = torch.int16 if has_upper_half else self.master_weight_dtype
            state["master_param"] = torch.empty(parameter.shape, dtype=dtype)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Keep what the first step keeps."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter)

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """As a checkpoint has it."""
        return self.state[parameter][name].float()

    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Nothing is loaded."""
