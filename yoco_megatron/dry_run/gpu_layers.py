"""The layers of Transformer Engine on fake tensors: what they keep, allocate, send and multiply, without numbers.

`Layers` is a backend as Megatron's specs know them. What a layer keeps decides a run's memory, and Transformer Engine's
layers differ from plain torch's: the weight's gradient is added to Megatron's buffer inside the product, a norm belongs
to the linear behind it, FP8 keeps one byte a value. Read from Transformer Engine 2.x and held against measured runs
(tests/dry_run/test_measured.py).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from yoco_megatron.dry_run.ledger import count_flops
from yoco_megatron.mixers.sliding_window import mean_visible_keys
from yoco_megatron.model.layers.norm import StandaloneRMSNorm
from yoco_megatron.model.yoco_config import YOCOConfig

Group = dist.ProcessGroup


class Linear(MegatronModule):
    """Column- or row-parallel linear, behind a norm of its own where `with_norm`.

    Attributes:
        save_original_input: FP8: keep the input itself, because others keep it anyway (Megatron sets it).
        exchanges: whether tensor-parallel ranks do in it; those of an expert do before and behind it.
    """

    column = True
    with_norm = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: YOCOConfig,
        tp_group: Group,
        bias: bool = False,
        is_expert: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        tp = tp_group.size()
        self.exchanges = tp > 1 and not is_expert
        shape = (output_size // tp, input_size) if self.column else (output_size, input_size // tp)
        weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        weight.tensor_model_parallel, weight.partition_stride = tp > 1, 1
        weight.partition_dim = 0 if self.column else 1
        self.bias: Any = None
        if bias:
            assert self.column, "biases of row-parallel layers are not built"
            self.bias = torch.nn.Parameter(torch.zeros(shape[0], dtype=config.params_dtype))
            self.bias.tensor_model_parallel, self.bias.partition_stride = tp > 1, 1
            self.bias.partition_dim = 0
        self.weight, self.tp_group, self.save_original_input = weight, tp_group, False
        self.sequence_parallel = config.sequence_parallel and self.exchanges
        if is_expert:  # else its gradients would be summed over all data-parallel ranks
            divided = config.expert_tensor_parallel_size != config.tensor_model_parallel_size
            weight.allreduce = not (divided or config.expert_model_parallel_size > 1)
        self.in_fp8: Tensor | None = None
        self.layer_norm_weight: Any = None
        if self.with_norm:
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, in] -> ([s, b, out], no bias)."""
        if self.config.fp8 and self.in_fp8 is None:  # the weight twice: as it is, and transposed for backward
            self.in_fp8 = self.weight.new_empty(2, *self.weight.shape, dtype=torch.uint8)
        y = _Linear.apply(x, self.weight, self.layer_norm_weight, self)
        return y if self.bias is None else _AddBias.apply(y, self.bias), None

    def backward_dw(self) -> None:
        """Nothing is delayed."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Transformer Engine's names."""
        state = {"weight": self.weight}
        if self.with_norm:
            state["layer_norm_weight"] = self.layer_norm_weight
        if self.bias is not None:
            state["bias"] = self.bias
        cut = {"weight": self.weight.partition_dim, "bias": 0}
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, cut, sharded_offsets, **groups)


class _AddBias(torch.autograd.Function):
    """Inside the product's kernel: no new tensor, nothing kept but the bias."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.empty_like(ctx.saved_tensors[0])


class RowLinear(Linear):
    """Row-parallel."""

    column = False


class NormLinear(Linear):
    """Column-parallel, behind a norm."""

    with_norm = True


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, norm_weight: Tensor | None, layer: Linear) -> Tensor:
        ctx.layer, ctx.dtype, ctx.fp8 = layer, x.dtype, bool(layer.config.fp8)
        of_norm: tuple[Tensor, ...] = ()
        read = x
        if norm_weight is not None:
            of_norm = x, norm_weight, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
            read = torch.empty_like(x)
        kept = read
        if ctx.fp8:
            if not layer.save_original_input:
                kept = _in_fp8(read)  # transposed, for backward
            read = _in_fp8(read)
        y = _product(_whole(read, layer, layer.column), weight, x.dtype, transposed=True)
        ctx.save_for_backward(kept, weight, *of_norm)
        return _part(y, layer, not layer.column)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        kept, weight, *of_norm = ctx.saved_tensors
        layer = ctx.layer
        transposed = _in_fp8(dy) if ctx.fp8 else None  # for the gradient of the weight
        dy = _whole(_in_fp8(dy) if ctx.fp8 else dy, layer, not layer.column)
        read = _whole(kept, layer, layer.column)
        dx = _part(_product(dy, weight, ctx.dtype), layer, layer.column)
        count_flops("products", 2 * weight.numel() * dy.shape[:-1].numel())
        del dy, read, kept, transposed  # before the norm's gradients are made
        in_place = layer.config.gradient_accumulation_fusion
        weight.grad_added_to_main_grad = in_place
        of_weight = _never_read(weight) if in_place else torch.empty_like(weight)
        if not of_norm:
            return dx, of_weight, None, None
        return torch.empty_like(of_norm[0]), of_weight, torch.empty_like(of_norm[1]), None


def _in_fp8(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    out = weight.shape[0 if transposed else 1]
    count_flops("products", 2 * weight.numel() * x.shape[:-1].numel())
    return x.new_empty(*x.shape[:-1], out, dtype=dtype)


def _whole(x: Tensor, layer: Linear, is_cut: bool) -> Tensor:
    """All tokens, where sequence parallelism cuts them on this side of the layer."""
    if not (is_cut and layer.sequence_parallel):
        return x
    out = x.new_empty(x.shape[0] * layer.tp_group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=layer.tp_group)
    return out


def _part(x: Tensor, layer: Linear, is_summed: bool) -> Tensor:
    """The sum over tensor-parallel ranks, or with sequence parallelism this rank's tokens of it."""
    if not (is_summed and layer.exchanges):
        return x
    if not layer.sequence_parallel:
        dist.all_reduce(x, group=layer.tp_group)
        return x
    out = x.new_empty(x.shape[0] // layer.tp_group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=layer.tp_group)
    return out


_UNREAD: dict[tuple, Tensor] = {}


def _never_read(weight: Tensor) -> Tensor:
    """What autograd gets for a weight whose gradient is in Megatron's buffer: one tensor for all weights of a shape."""
    key = weight.shape, weight.dtype
    if key not in _UNREAD:
        _UNREAD[key] = torch.empty(weight.shape, dtype=weight.dtype)
    return _UNREAD[key].detach()


class Norm(StandaloneRMSNorm):
    """RMSNorm as one kernel each way."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same."""
        return _Norm.apply(x, self.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32))
        return torch.empty_like(x, dtype=weight.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Attention(MegatronModule):
    """Causal attention, windowed if `config.window_size` is set, of one sequence or of packed documents."""

    def __init__(self, config: YOCOConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """Shapes as in model/layers/core_attention.py."""
        if value.untyped_storage()._cdata != key.untyped_storage()._cdata:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # get_qkv_layout
        # The lengths of documents are numbers of tensors.
        flops = attention_flops(query, key, self.window) if packed_seq_params is None else 0.0
        return _Attention.apply(query, key, value, flops).flatten(-2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, flops: float) -> Tensor:
        out = _empty(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32))
        ctx.flops = flops
        count_flops("attention", flops)
        return out

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        count_flops("attention", 2 * ctx.flops)
        return _empty(q), _empty(k), _empty(v), None


def _empty(x: Tensor) -> Tensor:
    """Like `x`, without the strides of a view."""
    return torch.empty(x.shape, dtype=x.dtype)


def attention_flops(query: Tensor, key: Tensor, window: int | None) -> float:
    """Of the forward pass of one sequence [s, b, H, D] over keys [s', b, G, D], of which the queries are the last."""

    def visible(length: int) -> float:
        return length * mean_visible_keys(length, window) if length else 0.0

    pairs = visible(len(key)) - visible(len(key) - len(query))
    return 4 * pairs * query[0].numel()


class Layers(LocalSpecProvider):
    """Megatron's backend of these layers."""

    def column_parallel_linear(self) -> type:
        return Linear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """One expert after the other (TESpecProvider)."""
        return partial(SequentialMLP, submodules=MLPSubmodules(linear_fc1=Linear, linear_fc2=RowLinear))

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return Attention
