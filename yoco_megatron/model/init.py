"""Initialisation: the authors' laws, and a model that does not depend on the mesh.

Megatron lets every tensor-parallel rank draw its own shard, so TP=1 and TP=8 start from different models. Here each
parameter is drawn whole from a generator seeded by (seed, its global name), and every rank keeps its part: the same
seed gives the same model at any mesh, and fan-in and fan-out are those of the whole matrix, as the laws want it.

The laws (authors' code; no scaling with depth anywhere):

    embedding                   N(0, std = h^-1/2)
    mixers of the self-decoder  their records' (`mixers`)
    every other matrix          U(-a, a), a = fan_in^-1/2
    norms                       1
    biases                      0
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from yoco_megatron.mixers import mixer_of_layer

Law = Callable[[Tensor, torch.Generator], Tensor]
BIASES = ("linear_qkv.bias", "linear_q.bias", "linear_kv.bias")  # --add-qkv-bias
LawOf = Callable[[str, torch.Size], Law | None]


def normal(std: float) -> Law:
    """N(0, std)."""
    return lambda w, generator: w.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Law:
    """U(-bound, bound)."""
    return lambda w, generator: w.uniform_(-bound, bound, generator=generator)


def xavier(fan_in: int, fan_out: int, gain: float) -> Law:
    """U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out))."""
    return uniform(gain * math.sqrt(6.0 / (fan_in + fan_out)))


def log_of_uniform(low: float, high: float) -> Law:
    """The logarithm of U(low, high)."""
    return lambda w, generator: w.uniform_(low, high, generator=generator).log_()


def softplus_is_log_uniform(low: float, high: float) -> Law:
    """What softplus makes log-uniform between low and high."""

    def law(w: Tensor, generator: torch.Generator) -> Tensor:
        step = w.uniform_(math.log(low), math.log(high), generator=generator).exp_()
        return w.copy_(step + torch.log(-torch.expm1(-step)))

    return law


def default_law(name: str, shape: torch.Size) -> Law | None:
    """The law of a mixer whose matrices are like every other matrix."""
    return None


def yoco_law(config: TransformerConfig) -> LawOf:
    """The authors' law for the parameter of a global name and whole shape, [fan_out, fan_in] for matrices."""
    own_law = mixer_law(config)

    def law(name: str, shape: torch.Size) -> Law | None:
        if name.endswith("word_embeddings.weight"):
            return normal(shape[1] ** -0.5)
        return own_law(name, shape) or (uniform(shape[1] ** -0.5) if len(shape) == 2 else None)

    return law


def mixer_law(config: TransformerConfig) -> LawOf:
    """The law in the record of a self-decoder layer's mixer, for its parameters; None for all others."""
    num_self = getattr(config, "num_self_decoder_layers", 0)  # a GPTModel has no self-decoder

    def law(name: str, shape: torch.Size) -> Law | None:
        place = re.search(r"layers\.(\d+)\.(\w+)\.(.+)", name)
        if not place or int(place[1]) >= num_self:
            return None
        mixer = mixer_of_layer(config.self_decoder, int(place[1]))
        return mixer.load("init_law")(place[3], shape) if place[2] == mixer.require("init_name") else None

    return law


def megatron_law(config: TransformerConfig) -> LawOf:
    """Megatron's law: N(0, init_method_std), projections back into the residual stream divided by sqrt(2 layers), the
    embedding N(0, embedding_init_method_std).

    Of matrices; a mixer's other parameters have the law in its record.
    """
    own_law = mixer_law(config)

    def law(name: str, shape: torch.Size) -> Law | None:
        if len(shape) != 2:
            return own_law(name, shape)
        if name.endswith("word_embeddings.weight"):
            return normal(config.embedding_init_method_std)
        back = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        return normal(config.init_method_std / (math.sqrt(2.0 * config.num_layers) if back else 1.0))

    return law


def initialize(
    model: torch.nn.Module, config: TransformerConfig, seed: int, law: str, pg_collection: ProcessGroupCollection
) -> None:
    """Draw every parameter of `model` (a GPTModel or YOCOModel, one pipeline stage of it).

    Args:
        law: "yoco" or "megatron" (--init-law).
        pg_collection: its tensor-parallel groups, of experts and of all else.
    Raises:
        ValueError: a parameter that has no law.
    """
    choose = (yoco_law if law == "yoco" else megatron_law)(config)
    with torch.no_grad():
        for name, param in named_parameters(model):
            if param.dim() == 1 and "norm" in name:
                param.fill_(1.0)
            elif name.endswith(BIASES):
                param.zero_()
            else:
                group = pg_collection.expt_tp if is_of_expert(name) else pg_collection.tp
                _assign(param, _draw(name, param, choose, seed, group.rank(), group.size()))


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by global name: the layer's number in the whole model, an expert's as well, and the mixer's own name
    for itself.

    A norm fused into a linear appears as '...layer_norm_weight'.
    """
    config: Any = model.config
    num_self = getattr(config, "num_self_decoder_layers", 0)
    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers")
            index = modules[".".join(parts[: at + 2])].layer_number - 1
            parts[at + 1] = str(index)
            if index < num_self and parts[at + 2] == "self_attention":
                parts[at + 2] = mixer_of_layer(config.self_decoder, index).require("init_name")
        if is_of_expert(name):
            at = parts.index("experts")
            held = modules[".".join(name.split(".")[:at])].local_expert_indices
            if parts[at + 1] == "local_experts":
                parts[at + 1 : at + 3] = [str(held[int(parts[at + 2])])]
            else:  # of a grouped product: linear_fc1.weight0, linear_fc1.weight1, ...
                parts[at + 1 :] = [str(held[int(parts[-1].removeprefix("weight"))]), parts[at + 1], "weight"]
        # A tied head on a stage of its own is a copy of the embedding.
        copied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
        yield "embedding.word_embeddings.weight" if copied else ".".join(parts), param


def is_of_expert(name: str) -> bool:
    """Whether a parameter belongs to one of the routed experts."""
    return ".mlp.experts." in name


def _draw(name: str, param: Tensor, choose: LawOf, seed: int, tp_rank: int, tp: int) -> Tensor:
    """This rank's part of the parameter, drawn whole in fp32."""
    dim = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", False) else -1
    shape = list(param.shape)
    if dim >= 0:
        shape[dim] *= tp
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(param.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    whole = torch.empty(shape, dtype=torch.float32, device=param.device)
    law = choose(name, whole.shape)
    if law is None:
        raise ValueError(f"parameter {name} of shape {tuple(param.shape)} has no initialisation law")
    law(whole, generator)
    if dim < 0:
        return whole
    if name.endswith("linear_fc1.weight"):  # [gate; up]: a rank holds a part of each half
        return torch.cat([half.chunk(tp, dim)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim)[tp_rank]


def _assign(param: Tensor, value: Tensor) -> None:
    """Copy `value` in. An FP8 parameter also keeps its unrounded initial value, from which the optimizer starts."""
    param.copy_(value)
    if hasattr(param, "get_high_precision_init_val"):
        param._high_precision_init_val = value.cpu()  # type: ignore[attr-defined]
