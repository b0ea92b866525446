"""Does each layer of the YOCO compute what the teacher's computes, given the teacher's own hidden states?

Where it must (`exact_layers`), another result is an error: mapping.py then misses a convention of the teacher. Cross
layers get their K,V from their own inputs here: what a YOCO changes on purpose, that all sets are projected from the
self-decoder's output, is no error of a layer. Weights are loaded layer by layer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from yoco_megatron.convert.readers import Source
from yoco_megatron.convert.verify import load_when_run, unloaded
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import SLIDING_WINDOW
from yoco_megatron.upcycling.mapping import kv_layers, readers
from yoco_megatron.upcycling.teacher import Teacher
from yoco_megatron.utils.errors import require

# fp32, summed in another order; the shared K,V are rounded to the weights' dtype once more.
TOLERANCE, ROUNDINGS = 1e-4, 8
LENGTH = 64


def exact_layers(config: YocoConfig, rule: str) -> list[bool]:
    """Which layers are the teacher's: window layers, and cross layers that alone gave their set its K,V."""
    windows = config.self_decoder == SLIDING_WINDOW.name
    sources = kv_layers(config, rule)
    cross = range(config.num_self_decoder_layers, config.num_hidden_layers)
    return [windows] * config.num_self_decoder_layers + [[layer] in sources for layer in cross]


def smallest_window(teacher: Teacher, config: YocoConfig) -> int | None:
    """Tokens up to which no window of either model leaves any out; None: there are no windows."""
    windows = [teacher.window, config.sliding_window if config.self_decoder == SLIDING_WINDOW.name else None]
    return min((window for window in windows if window is not None), default=None)


@torch.no_grad()
def layer_errors(teacher: Teacher, student: Source, dtype: torch.dtype = torch.float32) -> list[float]:
    """Of each layer, the norm of (student's output - teacher's) over that of what the teacher's layer adds.

    Both get the teacher's hidden states of random tokens, no more than any window.
    """
    config = student.config
    own = config.num_self_decoder_layers
    length = min(LENGTH, smallest_window(teacher, config) or LENGTH)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    shared_kv = {name: student.load(name) for name in student.dtypes if name.startswith("model.shared_kv.")}

    def load(name: str) -> Tensor:
        """Every cross layer asks for the shared K,V, which are made of many tensors."""
        return shared_kv[name] if name in shared_kv else student.load(name)

    yoco = unloaded(replace(student, load=load), dtype).model
    positions = torch.arange(length)[None]
    set_of = {layer: index for index, layers in enumerate(readers(config)) for layer in layers}
    found: list[float] = []

    def compare(_: Any, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        x, wanted, layer = inputs[0], output if isinstance(output, Tensor) else output[0], len(found)
        if layer < own:
            y = yoco.self_layers[layer](x, rotary=yoco.self_rotary(positions))
        else:
            rotary = yoco.cross_rotary(positions)
            k, v = yoco.shared_kv(x, rotary)[set_of[layer]]
            y = yoco.cross_layers[layer - own](x, k, v, rotary=rotary)
        error = torch.linalg.norm(y - wanted)
        added = torch.linalg.norm(wanted - x)
        found.append((error / added).item() if error != 0 else 0.0)  # a layer may add nothing

    model = _unloaded(teacher, dtype)
    for layer in model.layers:
        layer.register_forward_hook(compare)
    model(tokens, use_cache=False)
    return found


def _unloaded(teacher: Teacher, dtype: torch.dtype) -> Any:
    """transformers' model without its head, whose weights are loaded when they are needed."""
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(teacher.config, attn_implementation="sdpa").eval()
    model.rotary_emb = type(model.rotary_emb)(teacher.config)
    load_when_run(model, lambda name: teacher.tensors.load(f"model.{name}").to(dtype))
    return model


def check(teacher: Teacher, student: Source, rule: str) -> list[float]:
    """`layer_errors`. Raises ValueError where a layer that must be exact is not."""
    errors = layer_errors(teacher, student)
    eps = max(torch.finfo(dtype).eps for dtype in student.dtypes.values())
    allowed = TOLERANCE + ROUNDINGS * eps
    for layer, (error, exact) in enumerate(zip(errors, exact_layers(student.config, rule), strict=True)):
        require(
            not exact or error < allowed,
            f"--teacher {teacher.folder}: layer {layer} of the YOCO should compute what the teacher's does, and "
            f"differs by {error:.1e} (relative, {allowed:.0e} allowed): it has something that is not known here",
        )
    return errors
