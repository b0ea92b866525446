"""A CPU that takes the ways of a GPU: what each of them needs, named by the place that asks.

Kernels are not run: their results have sizes and no numbers. upstream/relied_on.py names what is replaced, so that
a new version says what to read again.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import megatron.core.optimizer as optimizers
import torch
import triton
from megatron.core import recompute, tensor_parallel
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec_for_backend
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from yoco_megatron import runtime
from yoco_megatron.dry_run import balanced_experts
from yoco_megatron.dry_run.fused_adam import FusedAdam
from yoco_megatron.dry_run.gpu_layers import Layers, NormLinear
from yoco_megatron.dry_run.ledger import count_flops
from yoco_megatron.model import builder, specs
from yoco_megatron.model.layers import recompute as layer_recompute
from yoco_megatron.ops import recomputed
from yoco_megatron.ops.gated_delta import dispatch as gated_delta_dispatch
from yoco_megatron.ops.gated_delta.torch import CHUNK
from yoco_megatron.ops.gated_retention import dispatch
from yoco_megatron.ops.gated_retention import triton as retention
from yoco_megatron.ops.linear_cross_entropy import torch as cross_entropy
from yoco_megatron.runtime import cpu

MULTIPROCESSORS = 132  # of an H100 or H200
# cuBLAS's: torch's for the thread of forward and that of backward, and Transformer Engine's.
WORKSPACE_BYTES = 3 * (32 << 20)
OPTIMIZERS = "transformer_engine.pytorch.optimizers"


# Flags that Megatron refuses without a GPU and Transformer Engine; `stand_ins` do as they say on a GPU.
OF_THIS_MACHINE = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "fp8": None,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "no_persist_layer_norm": True,
}


def defaults() -> Any:
    """Flags have the defaults of a GPU while this is entered."""
    return mock.patch.object(runtime, "argument_defaults", dict)


def stand_ins(flags: Namespace) -> Iterator[Any]:
    """Context managers. `flags` will have what OF_THIS_MACHINE changes."""
    yield defaults()
    yield mock.patch.object(cpu.DeviceProperties, "multi_processor_count", MULTIPROCESSORS)
    yield mock.patch.object(FakeTensor, "is_cuda", True)
    yield from _kernels()
    yield from _layers(flags)
    yield from balanced_experts.stand_ins()
    yield from _optimizer()


def _kernels() -> Iterator[Any]:
    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    yield mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", launch)
    has_kernels = replace(dispatch.BACKENDS[0], why_not=lambda *args: None)
    yield mock.patch.object(dispatch, "BACKENDS", [has_kernels, *dispatch.BACKENDS[1:]])

    fla = replace(gated_delta_dispatch.BACKENDS[0], why_not=lambda *args: None, run=gated_delta)
    yield mock.patch.object(gated_delta_dispatch, "BACKENDS", [fla])

    def plan(q: Tensor, v: Tensor, scale: float | None, ids: Tensor | None, segments: int | None) -> retention.Launch:
        cuda = torch.device("cuda", 0)
        return retention._plan(q.shape, v.shape[2], v.shape[3], scale, q.dtype, ids is not None, segments, cuda)

    yield mock.patch.object(retention, "plan", plan)
    # Fakes have no address.
    yield mock.patch.object(retention, "loadable", lambda x: x if x.stride(3) == 1 else x.contiguous())
    yield mock.patch.object(retention, "TensorDescriptor", lambda base, *_: base)

    def summarize(logits: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        count_flops("products", 2 * total.numel() * len(b))

    # Megatron compiles these: each is one kernel.
    yield mock.patch.multiple(
        fused_bias_swiglu,
        swiglu=lambda wide: wide.new_empty(*wide.shape[:-1], wide.shape[-1] // 2),
        swiglu_back=lambda dy, wide: torch.empty_like(wide),
    )
    yield mock.patch.object(recomputed, "_compiled", lambda function: function)
    yield mock.patch.multiple(
        cross_entropy,
        _summarize=summarize,
        _differentiate=lambda *_: None,
        _compiled=lambda function: function,
        _add_product=add_product,
    )


def _layers(flags: Namespace) -> Iterator[Any]:
    yield mock.patch.object(specs, "backend_for", return_value=Layers())
    yield mock.patch.object(builder, "local_gpt_spec", _gpt_spec)
    check = TransformerConfig.__post_init__

    def __post_init__(config: Any) -> None:
        check(config)
        # Megatron refuses both where Transformer Engine is missing.
        config.apply_rope_fusion = True
        config.fp8, config.fp8_recipe = flags.fp8, flags.fp8_recipe

    yield mock.patch.object(TransformerConfig, "__post_init__", __post_init__)

    def rotate(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Rotate.apply(x)

    yield mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", rotate)

    def checkpoint(function: Callable, share: bool, _: Any, __: Any, *args: Any) -> Any:
        return tensor_parallel.checkpoint(function, share, *args)

    yield mock.patch.object(recompute, "te_checkpoint", checkpoint, create=True)
    yield mock.patch.object(layer_recompute, "_without_fp8", nullcontext)


def gated_delta(*inputs: Tensor, initial_state: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    """By flash-linear-attention's kernels: arguments and shapes are those of ops/gated_delta."""
    return _GatedDelta.apply(*inputs, initial_state)


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None) -> Any:
        inverse = q.new_empty(*q.shape[:3], CHUNK)  # of each chunk's triangular system
        sums = torch.empty_like(log_decay)
        ctx.save_for_backward(*(x.contiguous() for x in (q, k, v)), sums, beta, inverse, state)
        B, _, H, K = q.shape
        return _fresh(v), q.new_empty(B, H, K, v.shape[-1], dtype=log_decay.dtype)

    @staticmethod
    def backward(ctx, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sums, beta, _, state = ctx.saved_tensors
        return *(_fresh(x) for x in (q, k, v, sums, beta)), None if state is None else _fresh(state)


def _fresh(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return torch.empty(dy.shape, dtype=dy.dtype)


def _gpt_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's layer with Transformer Engine (get_gpt_layer_with_transformer_engine_spec)."""
    layers = Layers()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.transformer.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = NormLinear, layers.row_parallel_linear()
    attention.core_attention = layers.core_attention()
    if config.transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = layers.layer_norm()
    layer.submodules.mlp = get_mlp_module_spec_for_backend(layers)
    count = get_num_layers_to_build(config.transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=layers.layer_norm())


def _optimizer() -> Iterator[Any]:
    yield mock.patch.multiple(optimizers, USING_PYTORCH_OPTIMIZER=False, Adam=FusedAdam)
    yield mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True, Adam=FusedAdam)
    module = ModuleType(OPTIMIZERS)
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]  # core/optimizer/optimizer_config.py asks for its arguments
    yield mock.patch.dict(sys.modules, {OPTIMIZERS: module})
