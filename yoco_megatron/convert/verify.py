"""Does the converted model compute what the source computes? Logits of both on real text, in fp32.

Layers of multi-token prediction, on which no logits depend, are compared bit by bit.

A training checkpoint is run by the trainer's own model, an exported one by the code inside its folder, so that a
mistake in tensor_names.py cannot hide on both sides. Where a whole model in fp32 does not fit into memory, both are run
layer by layer instead.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from yoco_megatron import runtime
from yoco_megatron.convert import tensor_names, tokenizer_files
from yoco_megatron.convert.readers import Source, open_source
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.hf.recurrence_yoco import CHUNK
from yoco_megatron.mixers import SLIDING_WINDOW, mixers_in

# The same products in fp32, summed in another order by other layers: some hundred roundings of 6e-8, with room.
TOLERANCE = 1e-4
# So many tokens beyond what a position sees directly: a window, or two chunks of the retention. With windows above
# LONGEST the comparison would take longer than the conversion.
BEYOND, LONGEST = 64, 2048
TEXT = """The harbour master kept two books. In the first he wrote the name of every ship that came in, its captain,
its cargo and the hour of the tide; in the second he wrote only what he would need to know tomorrow. When the first book
was full he began another, and after thirty years the shelves of his office held nothing else. The second book never had
more than a page. Asked which of the two he could not do without, he laughed: the first one answers any question you may
think of, he said, but it is the second one that I read. 3.14159 26535 89793; def f(x): return x ** 2 + 1"""


def sample_tokens(source: Source) -> tuple[Tensor, str]:
    """(ids [1, tokens], what they are): TEXT by the source's tokenizer, or random ids where it has none."""
    length = BEYOND + (min(_window(source), LONGEST) or 2 * CHUNK)
    if source.tokenizer is not None:
        ids = tokenizer_files.load(source.tokenizer)(TEXT, add_special_tokens=False)["input_ids"]
        return torch.tensor([(ids * (length // len(ids) + 1))[:length]]), "of English text"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, source.config.vocab_size, (1, length), generator=generator), "at random (no tokenizer)"


def _window(source: Source) -> int:
    """Keys that a position of a windowed layer sees; 0: all that came before."""
    return (source.config.sliding_window or 0) if SLIDING_WINDOW in mixers_in(source.config.self_decoder) else 0


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of found - wanted over that of wanted, [1, tokens, vocabulary]; summed in fp64, some tokens at a time."""
    squares = torch.zeros(2, dtype=torch.float64)
    for ours, theirs in zip(found.split(CHUNK, dim=1), wanted.split(CHUNK, dim=1), strict=True):
        theirs = theirs.double()
        squares += torch.stack([(ours.double() - theirs).square().sum(), theirs.square().sum()])
    return (squares[0] / squares[1]).sqrt().item()


def compare(source: Source, kind: str, folder: Path, iteration: int | None, whole: bool | None = None) -> str:
    """Compare the source with its conversion in `folder`.

    Args:
        whole: run the two models whole, or (False) layer by layer; by default as memory allows.
    Returns:
        a sentence that says what was compared and how close it is.
    Raises:
        ValueError: they differ.
    """
    tokens, what = sample_tokens(source)
    if whole is None:
        elements = sum(torch.Size(shape).numel() for shape in tensor_names.shapes(source.config).values())
        whole = 4 * elements * 1.2 < psutil.virtual_memory().available
    # Code in the source's folder is not run; that in the result's is ours.
    of_source = {"megatron": _by_trainer, "hf": _by_ours} if whole else {}
    of_result = {"megatron": _by_trainer, "hf": _by_folder} if whole else {}
    run = of_source.get(source.kind)
    logits = [run(source.folder, iteration, tokens) if run else _by_layers(source, tokens)]
    gc.collect()
    run = of_result.get(kind)
    result = open_source(kind, str(folder))
    logits.append(run(folder, None, tokens) if run else _by_layers(result, tokens))
    error = relative_difference(logits[1], logits[0])
    how = "" if whole else ", layer by layer because the whole does not fit into memory"
    if not error < TOLERANCE:  # nan fails too
        raise ValueError(
            f"{source.flag} {source.folder}: the converted model's logits differ from the source's by {error:.1e} "
            f"(relative, {TOLERANCE:.0e} allowed); nothing was written"
        )
    for name in tensor_names.shapes(result.config):
        if name.startswith(tensor_names.MULTI_TOKEN) and not torch.equal(result.load(name), source.load(name)):
            raise ValueError(f"{source.flag} {source.folder}: {name} is another after conversion; nothing was written")
    length, window = tokens.shape[1], _window(source)
    unproved = f"; fewer tokens than its window of {window:,}, which this does not prove" if length <= window else ""
    return f"logits of {length:,} tokens {what} agree within {error:.1e} (fp32{how}{unproved})"


@torch.no_grad()
def _by_trainer(folder: Path, iteration: int | None, tokens: Tensor) -> Tensor:
    from yoco_megatron.startup.load_run import load_model

    model, _ = load_model(str(folder), iteration, bf16=False, fp16=False)
    return model(tokens.to(runtime.device())).float().cpu()


@torch.no_grad()
def _by_folder(folder: Path, iteration: int | None, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def _by_ours(folder: Path, iteration: int | None, tokens: Tensor) -> Tensor:
    model = YocoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def _by_layers(source: Source, tokens: Tensor) -> Tensor:
    return unloaded(source)(tokens, use_cache=False).logits


def unloaded(source: Source, dtype: torch.dtype = torch.float32) -> YocoForCausalLM:
    """The exported model, of which a module's weights are loaded when it runs, and dropped afterwards."""
    with torch.device("meta"):
        model = YocoForCausalLM(source.config).eval()
    for rotary in (model.model.self_rotary, model.model.cross_rotary):
        rotary.reset(torch.device("cpu"))
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if source.config.tie_word_embeddings else {}
    load_when_run(model, lambda name: source.load(tied.get(name, name)).to(dtype))
    return model


def load_when_run(model: nn.Module, weight: Callable[[str], Tensor]) -> None:
    """Give the modules of a model on the meta device their weights by name for the time of their forward alone."""

    def load(path: str, module: nn.Module, *_: Any) -> None:
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(weight(f"{path}.{name}"), requires_grad=False))

    def drop(module: nn.Module, *_: Any) -> None:
        module.to("meta")

    for path, module in model.named_modules():
        if [*module.parameters(recurse=False)]:
            module.register_forward_pre_hook(partial(load, path))
            module.register_forward_hook(drop)
