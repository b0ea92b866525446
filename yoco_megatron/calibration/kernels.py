"""How fast this GPU does each kind of work of a layer, forward and backward.

Sizes are those of the 3B, in bf16 on random data, on which its power and so its speed depend. FLOPs are counted as
in costs/flops.py: the backward pass is twice the forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from torch import Tensor

from yoco_megatron import runtime
from yoco_megatron.calibration.timing import seconds
from yoco_megatron.mixers import get_mixer
from yoco_megatron.ops.gated_retention import gated_retention, log_decay_from_logits
from yoco_megatron.ops.gated_retention.dispatch import resolve_backend
from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    products: tuple[tuple[int, int], ...] = (
        *((3072, 12288), (3072, 3072), (3072, 16384), (8192, 3072)),  # of the 3B's layers
        *((8192, 7168), (3584, 8192)),  # of the 70B's FFN with TP8
    )
    """(inputs, outputs) of linear layers."""
    tokens: int = 8192
    lengths: tuple[tuple[int, int], ...] = ((4096, 24), (32768, 24), (131072, 24), (524288, 3))
    """(tokens, heads) of causal attention; a third as many K,V heads."""
    window: int = 1024
    hidden: int = 3072
    heads: int = 24
    vocab: int = 100_352
    parameters: int = 1 << 26
    """Of the optimizer."""
    collective: int = 1 << 28
    """Bytes that a rank holds of the largest collective."""
    seconds: float = 0.7
    """Of each measurement."""


TRIAL = Sizes(((64, 128), (64, 64)), 64, ((32, 3), (64, 3)), 16, 48, 3, 128, 1 << 12, 1 << 12, 0.001)


def measure(sizes: Sizes) -> dict[str, Any]:
    """Figures of a `Card` by their names; those of FP8 only where Transformer Engine can."""
    at_least = sizes.seconds
    found: dict[str, Any] = {}
    flops = [6.0 * sizes.tokens * inputs * outputs for inputs, outputs in sizes.products]
    times = [seconds(products(sizes.tokens, *shape), at_least) for shape in sizes.products]
    found["linear_tflops"] = sum(flops) / sum(times) / 1e12
    if runtime.has_transformer_engine() and torch.cuda.get_device_capability() >= (8, 9):
        found |= _fp8(sizes, sum(flops))
    found["attention_tflops"] = {
        length: 6 * heads * _width() * length * (length + 1) / seconds(attention(length, heads), at_least) / 1e12
        for length, heads in sizes.lengths
    }
    length = sizes.lengths[0][0]
    mixers = {
        "gated_retention": (retention(sizes), max(1, sizes.tokens // length)),
        "sliding_window": (attention(length, sizes.heads, sizes.window), 1),
    }
    found["mixing_tflops"] = {
        name: 3 * sequences * length * _mixing_flops(name, sizes) / seconds(run, at_least) / 1e12
        for name, (run, sequences) in mixers.items()
    }
    head = 6.0 * sizes.tokens * sizes.hidden * sizes.vocab
    in_chunks, at_once = heads_and_losses(sizes)
    found["head_in_chunks_tflops"] = head / seconds(in_chunks, at_least) / 1e12
    found["head_at_once_tflops"] = head / seconds(at_once, at_least) / 1e12
    del in_chunks, at_once
    found["optimizer_ps"] = seconds(optimizer(sizes.parameters), at_least) / sizes.parameters * 1e12
    return found


def products(tokens: int, inputs: int, outputs: int) -> Callable[[], object]:
    """Of a linear layer: forward, gradients of input and of weight."""
    x, dy, weight = _random(tokens, inputs), _random(tokens, outputs), _random(outputs, inputs)
    return lambda: (x @ weight.t(), dy @ weight, dy.t() @ x)


def _fp8(sizes: Sizes, flops: float) -> dict[str, float]:
    """Rate of the products alone, and what the casts of a linear layer take beside them."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import Linear, fp8_autocast

    # Each rank repeats as often as its own time says: a reduction over ranks would wait for ever.
    recipe = DelayedScaling(reduce_amax=False)
    alone = with_casts = values = 0.0
    for inputs, outputs in sizes.products:
        x = _random(sizes.tokens, inputs).requires_grad_()
        dy = _random(sizes.tokens, outputs)
        layer = Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device=x.device)

        def run(layer=layer, x=x, dy=dy) -> None:
            x.grad = None
            with fp8_autocast(enabled=True, fp8_recipe=recipe):
                # The weight is cast once a step, not once a micro-batch.
                layer(x, is_first_microbatch=layer.weight.grad is None).backward(dy)

        with_casts += seconds(run, sizes.seconds)
        alone += sum(
            seconds(_scaled_product(*shape), sizes.seconds / 3)
            for shape in (
                (sizes.tokens, inputs, outputs),
                (sizes.tokens, outputs, inputs),
                (outputs, sizes.tokens, inputs),
            )
        )
        values += sizes.tokens * (inputs + outputs)
    return {"linear_fp8_tflops": flops / alone / 1e12, "cast_ps": max(0.01, (with_casts - alone) / values * 1e12)}


def _scaled_product(rows: int, inner: int, columns: int) -> Callable[[], object]:
    a = _random(rows, inner).to(torch.float8_e4m3fn)
    b = _random(columns, inner).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def attention(length: int, heads: int, window: int | None = None) -> Callable[[], object]:
    """Causal attention of one sequence, forward and backward; in groups of three heads, with a window in none."""
    groups = heads if window else heads // 3
    q = _random(length, 1, heads, _width()).requires_grad_()
    k, v = (_random(length, 1, groups, _width()).requires_grad_() for _ in range(2))
    if runtime.has_transformer_engine():
        from transformer_engine.pytorch import DotProductAttention

        attend = DotProductAttention(
            heads,
            _width(),
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            window_size=(window - 1, 0) if window else None,
        )
        do = _random(length, 1, heads * _width())
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do)
    do = _random(1, heads, length, _width())

    def plain() -> object:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads > groups
        )
        return torch.autograd.grad(o, (q, k, v), do)

    return plain


def _mixing_flops(mixer: str, sizes: Sizes) -> float:
    """Forward, a token."""
    of_layer = SimpleNamespace(
        hidden_size=sizes.heads * _width(),
        self_decoder_heads=sizes.heads,
        self_decoder_head_dim=_width(),
        self_decoder_window=sizes.window,
        seq_length=sizes.lengths[0][0],
    )
    return get_mixer(mixer).mixing_flops(of_layer)


def retention(sizes: Sizes) -> Callable[[], object]:
    """The mixer of a retention layer, forward and backward: with rotation, norm and gate where one kernel has them."""
    length, heads, width = sizes.lengths[0][0], sizes.heads, _width()
    sequences = max(1, sizes.tokens // length)
    qkvg = _random(length, sequences, heads * 4 * width).requires_grad_()
    logits = _random(length, sequences, heads).requires_grad_()
    dy = _random(length, sequences, heads * width)
    backend = resolve_backend("auto", device=qkvg.device, dtype=qkvg.dtype, key_dim=width, value_dim=width)
    if backend.name == "triton":
        from yoco_megatron.ops.fused.retention_mixer import mix

        frequencies = torch.logspace(0, -4, width // 2, device=qkvg.device)
        angles = (torch.arange(length, device=qkvg.device)[:, None] * frequencies).float()
        angles = angles.repeat_interleave(2, -1)[:, None, None]
        return lambda: torch.autograd.grad(
            mix(qkvg.view_as(qkvg), logits, angles, tau=16.0, eps=1e-5), (qkvg, logits), dy
        )

    def plain() -> object:
        q, k, v, _ = qkvg.transpose(0, 1).unflatten(-1, (-1, 4, width)).unbind(3)
        o = gated_retention(q, k, v, log_decay_from_logits(logits.transpose(0, 1)), backend=backend.name)[0]
        return torch.autograd.grad(o.flatten(2).transpose(0, 1), qkvg, dy)

    return plain


def heads_and_losses(sizes: Sizes) -> tuple[Callable[[], object], Callable[[], object]]:
    """The output layer and its loss: in one chunk, and with Megatron's fused loss."""
    x = _random(sizes.tokens, sizes.hidden).requires_grad_()
    weight = _random(sizes.vocab, sizes.hidden).mul_(0.02).requires_grad_()
    labels = torch.randint(0, sizes.vocab, (sizes.tokens,), device=x.device)
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    group = parallel_state.get_tensor_model_parallel_group()  # of this rank alone

    def in_chunks() -> None:
        linear_cross_entropy(x, weight, labels, sizes.tokens, main_grad=main_grad)[0].sum().backward()
        x.grad = weight.grad = None

    def at_once() -> None:
        logits = (x @ weight.t()).unsqueeze(1)
        loss = fused_vocab_parallel_cross_entropy(logits, labels.unsqueeze(1), group)
        main_grad.add_(torch.autograd.grad(loss.sum(), (weight, x))[0])

    return in_chunks, at_once


def optimizer(parameters: int) -> Callable[[], object]:
    """Norm of the gradients, Adam in fp32, and the weights in bf16."""
    weight = torch.nn.Parameter(torch.randn(parameters, device=runtime.device()))
    low = weight.detach().to(_dtype())
    weight.grad = gradient = torch.randn_like(weight)
    adam = torch.optim.Adam([weight], fused=runtime.has_gpu())

    def step() -> None:
        gradient.norm()
        adam.step()
        low.copy_(weight.detach())

    return step


def _width() -> int:
    """Of a head."""
    return 128 if runtime.has_gpu() else 16


def _dtype() -> torch.dtype:
    return torch.bfloat16 if runtime.has_gpu() else torch.float32


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=runtime.device(), dtype=_dtype())
