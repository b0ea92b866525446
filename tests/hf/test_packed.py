"""Several documents in one row compute what each computes alone, or are refused; whichever way they are told apart.

fp32, 2e-5 relative: the same sums in chunks and masks that begin elsewhere.
"""

import pytest
import torch
from support.exported import small_config
from support.models import SELF_DECODERS, relative_error
from transformers import DynamicCache
from transformers.data.data_collator import DataCollatorWithFlattening

from yoco_megatron.hf import modeling_yoco, recurrence_yoco
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.hf.recurrence_yoco import retention

CLOSE = 2e-5
VOCAB = 97
# Rows of one length; a document longer than a retention chunk, one of a single token, borders inside chunks.
LENGTHS = [[10, 1, 150, 139], [100, 200]]


@pytest.fixture(params=[*SELF_DECODERS, "mamba2", "GR"])
def model(request) -> YocoForCausalLM:
    torch.manual_seed(5)
    return YocoForCausalLM(small_config(request.param, vocab_size=VOCAB)).eval()


def documents(lengths: list[list[int]] = LENGTHS) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    return [[torch.randint(0, VOCAB, (1, n), generator=generator) for n in row] for row in lengths]


def packed(lengths: list[list[int]] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, position_ids), [rows, tokens]."""
    ids = torch.cat([torch.cat(row, dim=1) for row in documents(lengths)])
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def alone(model: YocoForCausalLM, lengths: list[list[int]] = LENGTHS) -> torch.Tensor:
    rows = [[model(one, use_cache=False).logits for one in row] for row in documents(lengths)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_told_apart_by_positions(model, use_cache):
    """With and without the default of use_cache; there is no cache of several documents."""
    ids, positions = packed()
    expected = alone(model)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found = model(ids, position_ids=positions, use_cache=use_cache)
        assert relative_error(found.logits, expected) < CLOSE and found.past_key_values is None
        last = model(ids, position_ids=positions, use_cache=use_cache, logits_to_keep=7).logits
        assert last.shape == (2, 7, VOCAB) and relative_error(last, expected[:, -7:]) < CLOSE
    assert relative_error(model(ids).logits, expected) > 0.1, "one document a row is something else"


@torch.no_grad()
def test_told_apart_by_boundaries_and_numbers(model):
    """As transformers' collator gives them, with positions or without."""
    for positions in (True, False):
        options = {"return_flash_attn_kwargs": True, "return_seq_idx": True, "return_position_ids": positions}
        collate = DataCollatorWithFlattening(return_tensors="pt", **options)
        batch = dict(collate([{"input_ids": one[0]} for one in documents()[0]]))
        numbers, labels = batch.pop("seq_idx"), batch.pop("labels")
        expected = alone(model, LENGTHS[:1])
        assert relative_error(model(**batch).logits, expected) < CLOSE
        ids = batch["input_ids"]
        assert relative_error(model(ids, seq_idx=numbers).logits, expected) < CLOSE
        assert relative_error(model(**batch, labels=labels, seq_idx=numbers).logits, expected) < CLOSE


@torch.no_grad()
def test_flash_attention_gets_the_boundaries(model, monkeypatch):
    """Of all rows, in the flattened batch: it takes no mask and would see position_ids of a single row alone."""
    seen = []

    def flash(module, query, key, value, mask, **kwargs):
        seen.append({name: kwargs[name] for name in kwargs if name.startswith(("cu_seq", "max_"))})
        return query.transpose(1, 2), None

    functions = modeling_yoco.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(functions, "get_interface", lambda *_: flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    ids, positions = packed()
    model(ids, position_ids=positions)
    assert len(seen) == (4 if model.config.self_decoder == "sliding_window" else 2)
    for one in seen:
        for side in "qk":
            assert one[f"cu_seq_lens_{side}"].tolist() == [0, 10, 11, 161, 300, 400, 600]
            assert one[f"max_length_{side}"] == 200


def test_gradients_do_not_cross(model):
    ids, positions = packed([[9, 20]])
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, position_ids=positions).logits[:, 9:].sum().backward()
    first, second = embedded.grad[:, :9].abs().max(), embedded.grad[:, 9:].abs().max()
    assert first < 1e-6 * second, "but for rounding of sums of decays"


@torch.no_grad()
def test_refused_where_they_cannot_be_told_apart(model):
    ids, positions = packed([[9, 20]])
    with pytest.raises(ValueError, match=r"position_ids start again .* attention_mask"):
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="attention_mask holds numbers above 1"):
        model(ids, attention_mask=torch.tensor([[1] * 9 + [2] * 20]))
    with pytest.raises(ValueError, match=r"position_ids start again .* past_key_values"):
        model(ids, position_ids=positions, past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_padding_may_have_any_position(model):
    """Left and right, numbered as generate() and as collators number it."""
    ids, _ = packed([[12], [12]])
    for mask in (torch.tensor([[0] * 5 + [1] * 7, [1] * 12]), torch.tensor([[1] * 7 + [0] * 5, [1] * 12])):
        positions = mask.cumsum(-1) - 1
        for filler in (0, 1):
            numbered = positions.masked_fill(mask == 0, filler)
            found = model(ids, attention_mask=mask, position_ids=numbered).logits
            row = ids[:1, mask[0].bool()]
            assert relative_error(found[0][mask[0].bool()], model(row).logits[0]) < CLOSE


@torch.no_grad()
def test_a_mask_of_the_users_own_separates_both_halves(model):
    """A block-diagonal [b, 1, s, s] for attention; the retention follows the positions."""
    ids, positions = packed([[4, 20]])
    number = torch.tensor([0] * 4 + [1] * 20)
    mask = (number[:, None] == number[None]).tril()[None, None]
    if model.config.self_decoder == "sliding_window":  # it is the mask of the windows, too
        mask &= torch.ones(24, 24, dtype=torch.bool).triu(1 - model.config.sliding_window)
        model.model.cross_layers = torch.nn.ModuleList()
    found = model(ids, position_ids=positions, attention_mask=mask).logits
    assert relative_error(found, alone(model, [[4, 20]])) < CLOSE


def test_retention_under_autocast_is_fp32():
    """The state does not go through 16 bits where the layers around it do."""
    torch.manual_seed(7)
    model = YocoForCausalLM(YocoConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                       num_attention_heads=2))  # fmt: skip
    seen = []

    def watched(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return retention(*args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(recurrence_yoco, "retention", watched)
        model(torch.arange(20)[None])
    assert seen == [False]


def test_kernels_take_the_documents():
    """The trainer's op, as a GPU runs it, computes what the exported model's own code computes."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, 3, 300, 16, generator=generator) for _ in range(3))
    decay, state = -torch.rand(2, 3, 300, generator=generator) / 16, torch.randn(2, 3, 16, 16, generator=generator)
    documents = modeling_yoco.documents_of(packed()[1], 2, 300, None, None)
    for one in (documents, documents[:1].expand(2, -1), None):
        found = recurrence_yoco.retention_by_kernel(q, k, v, decay, state, one)
        for ours, theirs in zip(retention(q, k, v, decay, state, one), found):
            assert relative_error(ours, theirs) < CLOSE


@pytest.mark.parametrize("piece", [64, 4096])
@pytest.mark.parametrize("tokens", [37, 150])
def test_retention_at_once_is_token_by_token(monkeypatch, generator, piece, tokens):
    """Over the ends of documents, chunks and pieces; float64, gradients too."""
    monkeypatch.setattr(recurrence_yoco, "CHUNK", 16)
    monkeypatch.setattr(recurrence_yoco, "PIECE", piece)
    q, k, v = torch.randn(3, 2, 3, tokens, 8, generator=generator, dtype=torch.float64)
    decay = -torch.rand(2, 3, tokens, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v, decay, state)]
    documents = (torch.rand(2, tokens, generator=generator) < 0.05).cumsum(-1)
    found = retention(*inputs, documents)
    outputs, now = [], state
    for t in range(tokens):
        same = documents[:, t] == documents[:, max(t - 1, 0)]
        one = (x[:, :, t : t + 1] for x in (q, k, v, decay))
        o, now = retention(*one, now * same[:, None, None, None])
        outputs.append(o)
    expected = torch.cat(outputs, 2), now
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in expected]
    gradients = [torch.autograd.grad([*pair], inputs, weights) for pair in (found, expected)]
    for one, other in zip([*found, *gradients[0]], [*expected, *gradients[1]]):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
