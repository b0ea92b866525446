"""Layers of multi-token prediction draft what they were trained to, and generation with them gives the same text.

float64 throughout, so that a greedy choice does not depend on how many tokens a pass takes. Against the reference 1e-11
of the logits' norm: sums in another order.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.test_yoco_model import build_float64, leaves, random_batch, sizes_of
from support import reference_model
from support.exported import model_that_drafts, small_config, twin
from support.models import SELF_DECODERS, relative_error

from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference import speculative
from yoco_megatron.inference.generation import CachedModel, Sampling, generate
from yoco_megatron.inference.load import load_for_generation
from yoco_megatron.inference.speculative import SpeculativeEngine, SpeculativeModel

EXACT = 1e-11
GREEDY = Sampling(temperature=0)
CASES = {
    "retention, tied": (True, dict(mtp_num_layers=2)),
    "windows, two sets of K,V, QK-norm and biases": (
        False,
        dict(mtp_num_layers=2, self_decoder="sliding_window", shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True),
    ),
}


@torch.no_grad()
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_the_reference(case: str, generator: torch.Generator) -> None:
    tied, overrides = CASES[case]
    model = build_float64(tied, generator, **overrides)
    w = reference_model.weights_from_yoco(leaves(model), sizes_of(model.config))
    exported = twin(model)
    text = random_batch(generator)[0][:1]
    logits: list[torch.Tensor] = []
    exported.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    decoder = SpeculativeModel(exported, prefill_chunk=10)
    decoder.prefill(text[:, :-1])
    decoder.step(text[:, -1])
    _, *drafts, of_pass = logits
    # Each layer's input is the token before its draft: the text's last one, then the first draft.
    following = torch.cat((text[:, 1:], drafts[0].argmax(-1)[None]), dim=1)
    expected = reference_model.mtp_logits(w, text, following, sizes_of(model.config), 2)
    for found, of_layer in zip(drafts, expected, strict=True):
        assert relative_error(found[0], of_layer[0, -2]) < EXACT
    whole = torch.cat((text, *(one.argmax(-1)[None] for one in drafts)), dim=1)
    assert relative_error(of_pass, reference_model.logits(w, whole, sizes_of(model.config))[0, -3:]) < EXACT


DRAWN = Sampling(temperature=0.9, top_p=0.95, seed=7)
DECODERS = {
    SpeculativeModel: dict(prefill_chunk=3),
    SpeculativeEngine: dict(prefill_chunk=3, max_length=100, capacity=64),
}


@pytest.mark.parametrize(
    ("layers", "kv_cache_dtype", "sampling"), [(1, None, GREEDY), (2, None, DRAWN), (2, "int8", GREEDY)], ids=str
)
@pytest.mark.parametrize("kind", [*SELF_DECODERS, "RM"])
def test_the_text_is_that_of_one_token_at_a_time(
    kind: str, layers: int, kv_cache_dtype: str | None, sampling: Sampling
) -> None:
    """Drafts are right and wrong, also several times in a row, so that passes begin with tokens of the one before."""
    model = model_that_drafts(kind, layers)
    prompt, most = [[1, 2, 0, 1]], 70
    expected = list(generate(CachedModel(model, kv_cache_dtype=kv_cache_dtype), prompt, most, sampling))
    for make, options in DECODERS.items():
        for again in (0, 1 if make is SpeculativeEngine else 9):
            decoder = make(model, kv_cache_dtype=kv_cache_dtype, **options)
            decoder.most_again = again
            assert list(generate(decoder, prompt, most, sampling)) == expected, (make, again)
            assert decoder.verified > 30 and 0.1 < decoder.accepted / decoder.verified < 0.9


class Recording:
    """In the place of a CUDA graph: replaying writes the results where they were when it was recorded."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.results = run, [torch.empty_like(result) for result in results_of(run())]

    def replay(self) -> None:
        for place, result in zip(self.results, results_of(self.run()), strict=True):
            place.copy_(result)


def results_of(found: Any) -> list[torch.Tensor]:
    return [found] if torch.is_tensor(found) else list(found) if isinstance(found, tuple) else []


def record(run: Callable[[], Any], held: list[torch.Tensor]) -> tuple[Recording, Any]:
    before = [tensor.clone() for tensor in held]
    recording = Recording(run)
    for tensor, old in zip(held, before):
        tensor.copy_(old)
    return recording, recording.results[0] if len(recording.results) == 1 else tuple(recording.results)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_what_is_recorded_reads_and_writes_its_own_memory(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "record", record)
    model = model_that_drafts(kind, 1)
    expected = list(generate(CachedModel(model), [[1, 2, 0, 1]], 70, GREEDY))
    decoder = SpeculativeEngine(model, 100, capacity=64)
    decoder.uses_graphs = True
    assert list(generate(decoder, [[1, 2, 0, 1]], 70, GREEDY)) == expected
    # A token and a draft, behind one that is run again too; two that are run again; and what drafts.
    assert decoder.recorded.keys() == {(2, 2), (3, 2), (2, 0), "draft"}


def test_what_it_does_not_continue() -> None:
    decoder = SpeculativeModel(model_that_drafts("sliding_window", 1))
    with pytest.raises(ValueError, match="--speculative continues one prompt, not 2"):
        next(generate(decoder, [[1, 2], [2, 1]], 4, GREEDY))


def test_a_model_without_such_layers(tmp_path) -> None:
    YocoForCausalLM(small_config("sliding_window")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--speculative: the model of .* train with --mtp-num-layers 1"):
        load_for_generation(str(tmp_path), speculative=True)
