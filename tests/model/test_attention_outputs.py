"""Full recompute that stores attention outputs: attention runs once, with the gradients of running it twice."""

from collections.abc import Callable

import pytest
import torch
from support.models import FULL_RECOMPUTE, SELF_DECODERS, STORED_ATTENTION, VOCAB, build, tiny_config, train_step
from torch import Tensor

from yoco_megatron.model.layers.chunked_attention import ChunkedAttention
from yoco_megatron.model.layers.recompute import AttentionOutputStore

pytestmark = pytest.mark.usefixtures("one_process")
ONE_LAYER_OF_TWO = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
BOTH_LAYERS = FULL_RECOMPUTE | dict(recompute_num_layers=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layer numbers, one per call of attention."""
    made: list[int] = []
    attend = ChunkedAttention.attend

    def counting(self: ChunkedAttention, *args: object) -> Tensor:
        made.append(self.layer_number)
        return attend(self, *args)

    monkeypatch.setattr(ChunkedAttention, "attend", counting)
    return made


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, ONE_LAYER_OF_TWO, BOTH_LAYERS], ids=["one", "block", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(kind: str, recompute: dict, dtype: torch.dtype) -> None:
    model = dict(self_decoder=kind, params_dtype=dtype, bf16=dtype == torch.bfloat16, **recompute)
    whole = train_step(model)
    stored = train_step(model | dict(keep_cross_attention=True))
    assert whole.keys() == stored.keys()
    for name, want in whole.items():
        assert torch.equal(stored[name], want), name


def test_attention_runs_once(calls: list[int]) -> None:
    """Layers 3 and 4 are the cross-decoder."""
    step = dict(self_decoder="gated_retention")
    train_step(step | FULL_RECOMPUTE)
    assert sorted(calls) == [3, 3, 4, 4]
    calls.clear()
    train_step(step | STORED_ATTENTION)
    assert sorted(calls) == [3, 4]
    calls.clear()
    train_step(step | ONE_LAYER_OF_TWO | dict(keep_cross_attention=True))
    assert sorted(calls) == [3, 4]


def test_evaluation_stores_nothing(calls: list[int]) -> None:
    model = build(tiny_config(**STORED_ATTENTION)).eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 9, dtype=torch.long))
    assert logits.shape == (1, 9, VOCAB) and sorted(calls) == [3, 4]


def attention_of(key: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that saves its whole input for backward, as attention does."""
    return lambda query: (query @ key).square()


def test_micro_batches_have_their_own() -> None:
    """Two in flight: the backward of the first comes after the forward of the second."""
    key = torch.randn(4, 5)
    queries = [torch.randn(7, 4) for _ in range(2)]
    stores = [AttentionOutputStore() for _ in queries]
    with torch.no_grad():
        first = [store(1, attention_of(key), query.clone()) for store, query in zip(stores, queries)]
    for store, query, output in zip(stores, queries, first):
        again = query.clone().requires_grad_()
        replayed = store(1, attention_of(key), again)
        assert replayed.data_ptr() == output.data_ptr(), "the very memory that was stored"
        replayed.sum().backward()
        reference = query.clone().requires_grad_()
        attention_of(key)(reference).sum().backward()
        assert torch.equal(again.grad, reference.grad)


def test_the_memory_of_queries_is_freed() -> None:
    query = torch.randn(7, 4)
    with torch.no_grad():
        AttentionOutputStore()(1, attention_of(torch.randn(4, 5)), query)
        assert query.untyped_storage().nbytes() == 0
        with pytest.raises(AssertionError, match="view"):
            AttentionOutputStore()(1, attention_of(torch.randn(4, 5)), torch.randn(7, 8)[:, :4])


def test_a_second_backward_recomputes() -> None:
    key, query = torch.randn(4, 5), torch.randn(7, 4)
    store = AttentionOutputStore()
    with torch.no_grad():
        store(1, attention_of(key), query.clone())
    gradients = []
    for _ in range(2):
        again = query.clone().requires_grad_()
        store(1, attention_of(key), again).sum().backward()
        gradients.append(again.grad)
    assert torch.equal(*gradients)
