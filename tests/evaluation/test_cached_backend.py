"""The backend with caches against the whole model run anew for each answer, whatever the batches.

Tolerance: fp32 sums in another order, 2e-5 nats.
"""

import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from support.exported import small_config

from yoco_megatron.evaluation.backends.cached import CachedBackend
from yoco_megatron.evaluation.backends.logits import read_logits
from yoco_megatron.evaluation.requests import Generate, Score, TokenLosses
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.ops.attention.quantized import pack, unpack

VOCAB = 90  # of 97 rows
BUDGETS = (1, 40, 10_000)
Ids = Callable[[int], tuple[int, ...]]


@pytest.fixture(params=["gated_retention", "sliding_window"])
def model(request: pytest.FixtureRequest) -> YocoForCausalLM:
    torch.manual_seed(3)
    sets = {"sliding_window": 2}.get(request.param, 1)
    return YocoForCausalLM(small_config(request.param, shared_kv_sets=sets)).eval()


@pytest.fixture
def ids(generator: torch.Generator) -> Ids:
    return lambda count: tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())


@torch.no_grad()
def log_probabilities(model: YocoForCausalLM, tokens: tuple[int, ...]) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    return model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)


def continuation(model: YocoForCausalLM, one: Generate) -> list[int]:
    new: list[int] = []
    while len(new) < one.max_new_tokens:
        logits = log_probabilities(model, (*one.prompt, *new))[-1, :VOCAB]
        logits[list(one.banned)] = -torch.inf
        token = int(logits.argmax())
        if token in one.stop:
            break
        new.append(token)
    return new


def test_generate(model: YocoForCausalLM, ids: Ids) -> None:
    plain = [Generate(ids(length), new) for length, new in ((20, 6), (1, 3), (23, 2), (21, 9), (90, 4), (20, 0))]
    said = [continuation(model, one) for one in plain]
    banned = frozenset(said[0][:2])
    stops = [Generate(one.prompt, one.max_new_tokens, frozenset(new[2:3])) for one, new in zip(plain, said)]
    requests = [*plain, *stops, Generate(plain[0].prompt, 6, banned=banned)]
    wanted = [continuation(model, one) for one in requests]
    assert any(len(new) < one.max_new_tokens for new, one in zip(wanted, requests)) and not {*wanted[-1]} & banned
    for budget in BUDGETS:
        for chunk in (7, 100):
            backend = CachedBackend(model, None, VOCAB, token_budget=budget, prefill_chunk=chunk)
            assert list(backend.generate(requests)) == wanted, (budget, chunk)


def test_score(model: YocoForCausalLM, ids: Ids) -> None:
    contexts = [ids(length) for length in (12, 1, 12, 30, 12)]
    requests = [Score(context, tuple(map(ids, (3, 1, 5)[: 2 + n % 2]))) for n, context in enumerate(contexts)]
    greedy = tuple(continuation(model, Generate(contexts[0], 4)))
    requests.append(Score(contexts[0], (greedy, (*greedy[:3], (greedy[3] + 1) % VOCAB))))
    for budget in BUDGETS:
        answers = list(CachedBackend(model, None, VOCAB, token_budget=budget).score(requests))
        for one, found in zip(requests, answers, strict=True):
            for choice, likelihood in zip(one.continuations, found, strict=True):
                logs = log_probabilities(model, one.context + choice)[len(one.context) - 1 : -1]
                wanted = logs.gather(1, torch.tensor(choice)[:, None]).sum().item()
                assert likelihood.log_probability == pytest.approx(wanted, abs=2e-5), budget
                assert likelihood.is_greedy == (tuple(logs[:, :VOCAB].argmax(-1).tolist()) == choice)
        assert [likelihood.is_greedy for likelihood in answers[-1]] == [True, False]


def test_token_losses(model: YocoForCausalLM, ids: Ids) -> None:
    sizes = ((50, 1), (50, 49), (9, 3), (2, 1), (33, 20))
    requests = [TokenLosses(np.array(ids(length)), first) for length, first in sizes]
    for budget in BUDGETS:
        for chunk in (7, 100):
            backend = CachedBackend(model, None, VOCAB, token_budget=budget, prefill_chunk=chunk)
            for one, found in zip(requests, backend.token_losses(requests), strict=True):
                logs = log_probabilities(model, tuple(one.tokens))[one.first - 1 : -1]
                wanted = -logs.gather(1, torch.tensor(one.tokens[one.first :])[:, None])[:, 0]
                assert found.dtype == np.float32 and np.abs(found - wanted.numpy()).max() < 2e-5, (budget, chunk)


def test_kinds_in_turn(model: YocoForCausalLM, ids: Ids) -> None:
    """Each sets the attention that its cache needs."""
    backend = CachedBackend(model, None, VOCAB)
    score, losses = [Score(ids(5), (ids(2),))], [TokenLosses(ids(7), 5)]
    first, _, again = list(backend.score(score)), list(backend.token_losses(losses)), list(backend.score(score))
    assert first == again


def test_cross_decoder_runs_at_the_choices_alone(model: YocoForCausalLM, ids: Ids) -> None:
    rows = {"self": 0, "cross": 0}

    def counts(half: str) -> Callable:
        return lambda layer, inputs: rows.update({half: rows[half] + inputs[0].shape[:2].numel()})

    model.model.self_layers[0].register_forward_pre_hook(counts("self"))
    model.model.cross_layers[0].register_forward_pre_hook(counts("cross"))
    backend = CachedBackend(model, None, VOCAB)
    list(backend.score([Score(ids(30), (ids(3), ids(1)))]))
    assert rows == {"self": 29 + 2 * 3, "cross": 2 * 3}
    list(backend.token_losses([TokenLosses(ids(31), 21)]))
    assert rows == {"self": 35 + 30, "cross": 6 + 10}
    list(backend.generate([Generate(ids(20), 3)]))
    assert rows == {"self": 65 + 20 + 2, "cross": 16 + 1 + 2}


def test_sequences_beyond_the_model(model: YocoForCausalLM) -> None:
    length = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"a sequence of {length + 1:,} tokens: those of the model end at {length:,}"):
        list(CachedBackend(model, None).generate([Generate((1,) * length, 1)]))


def test_logits_that_are_no_numbers() -> None:
    logits = torch.tensor([[1.0, math.nan, 3.0], [math.nan] * 3])
    losses, likeliest = read_logits(logits, torch.tensor([0, 0]), torch.tensor([False] * 3))
    assert losses.isnan().all() and likeliest.tolist() == [2, 0]


def test_one_byte_a_value(model: YocoForCausalLM, ids: Ids) -> None:
    """All answers are those of the model whose shared K,V are rounded where they are made.

    Tolerance: a thousandth, as other sums move few values by a step of one byte; the rounding moves losses by more.
    """
    rounded = deepcopy(model)
    rounded.model.shared_kv.register_forward_hook(
        lambda _, inputs, pairs: [tuple(unpack(pack(t, "fp8"), "fp8", t.dtype) for t in pair) for pair in pairs]
    )
    tokens, choice, prompt = ids(50), ids(4), ids(30)
    backend = CachedBackend(model, None, VOCAB, prefill_chunk=7, kv_cache_dtype="fp8")
    logs, exact = (log_probabilities(one, tokens) for one in (rounded, model))
    wanted, plain = (-of[:-1, :].gather(1, torch.tensor(tokens)[1:, None])[:, 0] for of in (logs, exact))
    (losses,) = backend.token_losses([TokenLosses(np.array(tokens), 1)])
    assert np.abs(losses - wanted.numpy()).max() < 1e-3 < 5e-3 < (wanted - plain).abs().max()
    ((likelihood,),) = backend.score([Score(tokens, (choice,))])
    logs = log_probabilities(rounded, tokens + choice)[len(tokens) - 1 : -1]
    assert likelihood.log_probability == pytest.approx(
        logs.gather(1, torch.tensor(choice)[:, None]).sum().item(), abs=1e-3
    )
    assert list(backend.generate([Generate(prompt, 6)])) == [continuation(rounded, Generate(prompt, 6))]
