"""Gated memory unit: a cross-decoder layer's mixer that attends to nothing (SambaY, arXiv 2507.06607).

    y = (m * silu(x W1)) W2                             m the memory, the readout of a layer of the self-decoder

Each position reads its own m alone. Shapes: s positions, b batch, h hidden, W values of the memory that this
tensor-parallel rank holds, those of its heads.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yoco_megatron.config.memory_units import memory_width
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedReaders
from yoco_megatron.model.layers.norm import widen
from yoco_megatron.model.layers.projections import input_projection, output_projection, save_original_input
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.recomputed import recomputed


@dataclass
class GatedMemoryUnitSubmodules:
    """W1 and W2."""

    linear_gate: type
    linear_proj: type


class GatedMemoryUnit(MegatronModule):
    """Mixer [s, b, h] -> [s, b, h]; with sequence parallelism [s/tp, b, h], where m has all s."""

    def __init__(
        self,
        config: YOCOConfig,
        submodules: GatedMemoryUnitSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, width = layer_number, memory_width(config)
        self.linear_gate = input_projection(submodules.linear_gate, config, width, pg_collection.tp)
        self.linear_proj = output_projection(submodules.linear_proj, config, width, pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, *, attention_bias: SharedReaders, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (normalised) -> (out [s, b, h], no bias)."""
        assert attention_bias.memory is not None  # YOCOBlock says why it comes by this name
        gate, _ = self.linear_gate(hidden_states)
        return self.linear_proj(recomputed(_gated, gate, attention_bias.memory.read_stacked()))

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients (called by Megatron's schedules)."""
        self.linear_proj.backward_dw()
        self.linear_gate.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm: save the norm's input instead of its quantised output."""
        save_original_input(self.linear_gate)


def _gated(gate: Tensor, memory: Tensor) -> Tensor:
    """Both [s, b, W] -> silu(gate) * memory, in gate's dtype."""
    return (F.silu(widen(gate)) * widen(memory)).to(gate.dtype)
