"""A mixer of the self-decoder that the package does not know: each token's mean over the tokens up to it."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from support.cli import _main
from yoco_megatron.mixers import Mixer, register
from yoco_megatron.model.layers.projections import input_projection, output_projection
from yoco_megatron.model.specs import pre_norm_layer


@dataclass
class Submodules:
    linear_in: type
    linear_proj: type


class CausalMean(MegatronModule):
    """out = mean_{j <= i}(x_j W_in) W_out. Context parallelism and packed documents are not built."""

    def __init__(
        self, config: Any, submodules: Submodules, layer_number: int, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.linear_in = input_projection(submodules.linear_in, config, config.hidden_size, pg_collection.tp)
        self.linear_proj = output_projection(submodules.linear_proj, config, config.hidden_size, pg_collection.tp)

    def forward(self, hidden_states: Tensor, attention_mask: None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        x, _ = self.linear_in(hidden_states)
        count = torch.arange(1, x.shape[0] + 1, device=x.device, dtype=x.dtype)
        return self.linear_proj(x.cumsum(0) / count[:, None, None])


def layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    parts = Submodules(backend.column_parallel_linear(), backend.row_parallel_linear())
    norm = backend.layer_norm(rms_norm=True)
    return pre_norm_layer(backend, ModuleSpec(module=CausalMean, submodules=parts), norm, fused_into=None)


FIELDS = dict(
    name="causal_mean",
    letter="X",
    options=(),
    check=lambda sizes: None,
    divided=lambda sizes: {},
    layer_spec="support.toy_mixer:layer_spec",
    init_law="yoco_megatron.model.init:default_law",
    init_name="causal_mean",
    is_softmax_attention=False,
    separates_documents=False,
    matmul_parameters=lambda sizes: 2 * sizes.hidden_size**2,
    mixing_flops=lambda sizes: 0.0,
    flop_rate=lambda backend: 1e12,
    stored_bytes=lambda sizes, bytes_per_value: 2 * sizes.hidden_size * bytes_per_value,
    recomputed_values=lambda sizes: 0,
    received_bytes=None,
    memory_width=lambda sizes: 0,
    tensors=None,
    vectors=lambda sizes: {},
    fused=None,
    fused_norm=None,
    hf_layer_type=None,
    fla_type=None,
    cache_bytes=None,
    cache=None,
    description=lambda sizes: "causal mean",
)
TOY = register(Mixer(**FIELDS))


def main(flags: list[str]) -> None:
    """`pretrain_yoco.main` in a process that knows the mixer: this module has registered it."""
    _main(flags)
