"""ModuleSpecs of YOCO's layers: which class implements each part, Transformer Engine's or plain torch's.

Megatron's `BackendSpecProvider` names the parts. The self-decoder's layers have their specs beside their mixers.
"""

from dataclasses import replace
from functools import partial

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from yoco_megatron.model.cross_decoder.cross_attention import SharedKVAttention, SharedKVAttentionSubmodules
from yoco_megatron.model.cross_decoder.gated_memory_unit import GatedMemoryUnit, GatedMemoryUnitSubmodules
from yoco_megatron.model.cross_decoder.shared_kv import SharedKVSubmodules
from yoco_megatron.model.layers.core_attention import TorchAttention
from yoco_megatron.model.layers.mlp import RecomputeMLP
from yoco_megatron.model.layers.norm import RMSNorm, StandaloneRMSNorm
from yoco_megatron.model.yoco_config import YOCOConfig


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local backend, with a norm that knows sequence parallelism and attention that knows windows."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return StandaloneRMSNorm

    def core_attention(self) -> type:
        return TorchAttention


def backend_for(config: YOCOConfig) -> BackendSpecProvider:
    """Transformer Engine or plain torch, as --transformer-impl says."""
    return TESpecProvider() if config.transformer_impl == "transformer_engine" else TorchSpecProvider()


def norm_and_linear(backend: BackendSpecProvider) -> tuple[type, type]:
    """(norm, column-parallel linear); where the backend fuses them the norm is the identity."""
    if backend.fuse_layernorm_and_linear():
        return IdentityOp, backend.column_parallel_layer_norm_linear()
    return RMSNorm, backend.column_parallel_linear()


def pre_norm_layer(
    backend: BackendSpecProvider, attention: ModuleSpec, norm: type, fused_into: str | None
) -> ModuleSpec:
    """A pre-norm layer: norm, attention, residual; norm, SwiGLU, residual.

    `fused_into` is the linear that Transformer Engine fuses the first norm into; checkpoints use that name always.
    """
    mlp_norm, linear_fc1 = norm_and_linear(backend)
    mlp = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=backend.row_parallel_linear())
    names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if fused_into:
        names["input_layernorm."] = f"self_attention.{fused_into}.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=partial(RecomputeMLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def with_experts(layer: ModuleSpec, backend: BackendSpecProvider, config: YOCOConfig) -> ModuleSpec:
    """`layer` with Megatron's mixture of experts in place of its SwiGLU.

    The norm before it stands apart: the router reads its output as the experts do.
    """
    parts = layer.submodules
    names = {name: key for name, key in parts.sharded_state_dict_keys_map.items() if name != "pre_mlp_layernorm."}
    experts = get_moe_module_spec_for_backend(backend, config.num_moe_experts, config.moe_grouped_gemm)
    norm = backend.layer_norm(rms_norm=True)
    parts = replace(parts, pre_mlp_layernorm=norm, mlp=experts, sharded_state_dict_keys_map=names)
    return replace(layer, submodules=parts)


def cross_decoder_layer(backend: BackendSpecProvider) -> ModuleSpec:
    """Cross-decoder layer: queries of its own over the shared K,V."""
    norm, linear_q = norm_and_linear(backend)
    attention = ModuleSpec(
        module=SharedKVAttention,
        submodules=SharedKVAttentionSubmodules(
            linear_q=linear_q,
            q_norm=backend.layer_norm(rms_norm=True, for_qk=True),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )
    return pre_norm_layer(backend, attention, norm, fused_into="linear_q")


def memory_unit_layer(backend: BackendSpecProvider) -> ModuleSpec:
    """Cross-decoder layer that is a gated memory unit."""
    norm, linear_gate = norm_and_linear(backend)
    unit = ModuleSpec(
        module=GatedMemoryUnit,
        submodules=GatedMemoryUnitSubmodules(linear_gate=linear_gate, linear_proj=backend.row_parallel_linear()),
    )
    return pre_norm_layer(backend, unit, norm, fused_into="linear_gate")


def shared_kv(backend: BackendSpecProvider) -> SharedKVSubmodules:
    """The projection to the one K,V, with its own norm."""
    norm, linear_kv = norm_and_linear(backend)
    return SharedKVSubmodules(linear_kv, backend.layer_norm(rms_norm=True, for_qk=True), layernorm=norm)
