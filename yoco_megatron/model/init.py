"""Initialisation: the authors' laws, and a model that does not depend on the mesh.

Megatron lets every tensor-parallel rank draw its own shard, so TP=1 and TP=8 start from different models. Here each
parameter is drawn whole from a generator seeded by (seed, its global name), and every rank keeps its part: the same
seed gives the same model at any mesh, and fan-in and fan-out are those of the whole matrix, as the laws want it.

The laws (authors' code; no scaling with depth anywhere):

    embedding                   N(0, std = h^-1/2)
    retention W_q W_k W_v W_g   Xavier uniform, gain 2^-2.5, each matrix by itself
    retention w (decay)         Xavier uniform, gain 2^-2.5
    retention W_o               Xavier uniform, gain 2^-1
    every other matrix          U(-a, a), a = fan_in^-1/2
    norms                       1
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Law = Callable[[Tensor, torch.Generator], Tensor]


def normal(std: float) -> Law:
    """N(0, std)."""
    return lambda w, generator: w.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Law:
    """U(-bound, bound)."""
    return lambda w, generator: w.uniform_(-bound, bound, generator=generator)


def xavier(fan_in: int, fan_out: int, gain: float) -> Law:
    """U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out))."""
    return uniform(gain * math.sqrt(6.0 / (fan_in + fan_out)))


def yoco_law(name: str, shape: torch.Size) -> Law:
    """The authors' law for the parameter of that global name and whole shape [fan_out, fan_in]."""
    fan_out, fan_in = shape
    if name.endswith("word_embeddings.weight"):
        return normal(fan_in**-0.5)
    if name.endswith("linear_qkvg.weight"):
        return xavier(fan_in, fan_out // 4, gain=2**-2.5)  # four matrices in one
    if name.endswith("linear_decay.weight"):
        return xavier(fan_in, fan_out, gain=2**-2.5)
    if name.endswith("retention.linear_proj.weight"):
        return xavier(fan_in, fan_out, gain=2**-1)
    return uniform(fan_in**-0.5)


def megatron_law(config: TransformerConfig) -> Callable[[str, torch.Size], Law]:
    """Megatron's law: N(0, init_method_std), projections back into the residual stream divided by sqrt(2 layers)."""

    def law(name: str, shape: torch.Size) -> Law:
        back = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        return normal(config.init_method_std / (math.sqrt(2.0 * config.num_layers) if back else 1.0))

    return law


def initialize(model: torch.nn.Module, config: TransformerConfig, seed: int, law: str, tp_rank: int, tp: int) -> None:
    """Draw every parameter of `model` (a GPTModel or YOCOModel, one pipeline stage of it).

    Args:
        law: "yoco" or "megatron" (--init-law).
        tp_rank, tp: which tensor-parallel part this process holds, of how many.
    Raises:
        ValueError: a parameter that has no law.
    """
    choose = yoco_law if law == "yoco" else megatron_law(config)
    with torch.no_grad():
        for name, param in named_parameters(model):
            if param.dim() == 1 and "norm" in name:
                param.fill_(1.0)
            elif param.dim() == 2:
                _assign(param, _draw(name, param, choose, seed, tp_rank, tp))
            else:
                raise ValueError(f"parameter {name} of shape {tuple(param.shape)} has no initialisation law")


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by global name: the layer's number in the whole model, and 'retention' for a retention mixer.

    A norm fused into a linear appears as '...layer_norm_weight'.
    """
    from yoco_megatron.model.self_decoder.gated_retention import GatedRetention

    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers")
            layer = modules[".".join(parts[: at + 2])]
            parts[at + 1] = str(layer.layer_number - 1)
            if isinstance(layer.self_attention, GatedRetention):
                parts = ["retention" if part == "self_attention" else part for part in parts]
        # A tied head on a stage of its own is a copy of the embedding.
        copied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
        yield "embedding.word_embeddings.weight" if copied else ".".join(parts), param


def _draw(
    name: str, param: Tensor, choose: Callable[[str, torch.Size], Law], seed: int, tp_rank: int, tp: int
) -> Tensor:
    """This rank's part of the parameter, drawn whole in fp32."""
    dim = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", False) else -1
    shape = list(param.shape)
    if dim >= 0:
        shape[dim] *= tp
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(param.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    whole = torch.empty(shape, dtype=torch.float32, device=param.device)
    choose(name, whole.shape)(whole, generator)
    if dim < 0:
        return whole
    if name.endswith("linear_fc1.weight"):  # [gate; up]: a rank holds a part of each half
        return torch.cat([half.chunk(tp, dim)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim)[tp_rank]


def _assign(param: Tensor, value: Tensor) -> None:
    """Copy `value` in. An FP8 parameter also keeps its unrounded initial value, from which the optimizer starts."""
    param.copy_(value)
    if hasattr(param, "get_high_precision_init_val"):
        param._high_precision_init_val = value.cpu()
