"""Self-speculative generation: the layers of multi-token prediction draft, and one pass of the model checks.

With t the text so far and h the hidden state of the token before its last one, layer N drafts the N-th token after the
text (model/multi_token_prediction.py):

    h   <- layer_N(h, E[last token or draft]; shared K,V of the text before its last token),   argmax head(norm(h))

The model then runs the last token and the drafts at once. Where the next token, however it is chosen, is the draft,
its logits are there already. Where not, the caches go back to before that pass: shared K,V are cut off, the
self-decoder's small ones were copied, and the next pass begins with the tokens of this one that are part of the text.
The text is that of a decoder without drafts, as all logits that choose it are the model's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from yoco_megatron.hf.modeling_yoco import YocoCrossAttention, YocoForCausalLM, YocoLayer, YocoRMSNorm
from yoco_megatron.inference.cache import GlobalKV
from yoco_megatron.inference.engine import PREFILL_CHUNK, Engine, has_kernels, record
from yoco_megatron.inference.generation import CachedModel, bytes_of
from yoco_megatron.inference.quantized_cache import read


class MultiTokenLayer(YocoLayer):
    """One layer of multi-token prediction, by the names of an export.

    Args:
        depth: 0 for the one that predicts the token after the next one.
    """

    def __init__(self, config: Any, depth: int) -> None:
        index = config.num_hidden_layers + depth
        super().__init__(config, YocoCrossAttention(config, index), index)
        self.hidden_norm, self.embedding_norm = (YocoRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def join(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Its input: of hidden states before the final norm, and of the scaled embeddings of the tokens that they
        predict, all [b, s, h]."""
        return self.proj(torch.cat((self.hidden_norm(hidden), self.embedding_norm(embeddings)), dim=-1))


def attach(model: YocoForCausalLM) -> None:
    """Add the layers of multi-token prediction, without their weights, where the names of an export have them.

    The model then leaves what its final norm gets in `model.before_norm`.
    """
    inner = model.model
    inner.mtp_layers = nn.ModuleList(
        MultiTokenLayer(model.config, depth) for depth in range(model.config.mtp_num_layers)
    )

    def keep(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        inner.before_norm = inputs[0]

    inner.norm.register_forward_pre_hook(keep)


def draft(model: YocoForCausalLM, token: Tensor, hidden: Tensor, k: Any, v: Any, rotary: Any) -> Tensor:
    """The likeliest tokens [1, layers] after `token` [1, 1], by each layer one more.

    Args:
        hidden: [1, 1, h] before the final norm, of the token before it.
        k, v: of the text before `token`, as the model's attention takes them.
        rotary: of the position of `hidden`.
    """
    found = []
    scale = model.config.hidden_size**0.5 if model.config.scale_embedding else 1.0
    for layer in model.model.mtp_layers:
        hidden = layer(layer.join(hidden, model.model.embed_tokens(token) * scale), k, v, rotary=rotary)
        token = model.lm_head(model.model.norm(hidden)).argmax(-1)
        found.append(token)
    return torch.cat(found, dim=1)


class Speculation(ABC):
    """A decoder for one text: what goes before its class is how that one runs several tokens, and goes back.

    Args:
        model: a YOCO with its layers of multi-token prediction (`attach`).

    Attributes:
        verified, accepted: drafts that the text has come to, and those of them that are in it.
        most_again: tokens that a pass takes again; more than these enter the caches for good, in a pass of their own
            without the cross-decoder.
    """

    model: Any
    most_again: int

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        self.verified = self.accepted = 0
        self.copied: list[Any] = []
        # What went through the model since the copy of its caches: `confirmed` tokens of the text, then drafts.
        self.ran: list[int] = []
        self.confirmed = 0
        # Of the last positions, up to that of the last draft; hidden states are those before the final norm.
        self.hidden = self.logits = torch.empty(0)

    @abstractmethod
    def _length(self) -> int:
        """Tokens in the caches, drafts included."""

    @abstractmethod
    def _draft(self, token: int, hidden: Tensor, length: int) -> list[int]:
        """`draft` behind a text of `length` tokens in the caches and `token`."""

    @abstractmethod
    def _pass(self, tokens: list[int], keep: int) -> Any:
        """Run tokens; (logits, hidden states before the final norm) [1, keep, ..] of the last, unless keep is 0."""

    @abstractmethod
    def _copy(self) -> None:
        """Copy the self-decoder's caches."""

    @abstractmethod
    def _go_back(self, tokens: int) -> None:
        """The caches of before the last `tokens` tokens, of when they were copied."""

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [1, vocabulary] after a prompt [1, T]. Raises ValueError for several."""
        if len(ids) > 1:
            raise ValueError(f"--speculative continues one prompt, not {len(ids)}: leave it out, or the other prompts")
        logits = super().prefill(ids, mask)  # type: ignore[misc]
        self.hidden = self.model.model.before_norm
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Take the next token [1] of the text; logits [1, vocabulary] after it, known already if it was drafted."""
        token, drafts = int(tokens), self.ran[self.confirmed :]
        self.verified += bool(drafts)
        if drafts[:1] == [token]:
            self.accepted += 1
            self.confirmed += 1
        else:
            self._run(token)
        return self.logits[:, self._last]

    @property
    def _last(self) -> int:
        """Index of the text's last token in `hidden` and `logits`, from their end."""
        return self.confirmed - len(self.ran) - 1

    @torch.no_grad()
    def _run(self, token: int) -> None:
        """Run the next token of the text, and drafts of what follows; those of the last pass were not in it."""
        drafts = self._draft(token, self.hidden[:, self._last, None], self._length() + self._last + 1)
        again: list[int] = []
        if self.confirmed < len(self.ran):
            again = self.ran[: self.confirmed]
            self._go_back(len(self.ran))
        if len(again) > self.most_again:
            self._pass(again, keep=0)
            again = []
        self._copy()
        self.ran, self.confirmed = [*again, token, *drafts], len(again) + 1
        self.logits, self.hidden = self._pass(self.ran, keep=1 + len(drafts))

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)


class SpeculativeModel(Speculation, CachedModel):
    """With transformers' caches, on any device."""

    most_again = 4

    def _length(self) -> int:
        return self.length

    def _draft(self, token: int, hidden: Tensor, length: int) -> list[int]:
        model = self.model.model
        k, v = read(self.cache.layers[model.shared_kv.layer_indices[-1]], length, hidden.dtype)
        rotary = model.cross_rotary(torch.tensor([[length - 1]], device=hidden.device))
        return draft(self.model, self._ids([token]), hidden, k, v, rotary)[0].tolist()

    def _pass(self, tokens: list[int], keep: int) -> Any:
        ids = self._ids(tokens)
        if not keep:
            return self._forward(ids, last=False)
        logits = self.model(ids, use_cache=True, logits_to_keep=keep, **self._places(ids)).logits
        return logits, self.model.model.before_norm

    def _copy(self) -> None:
        self.copied = deepcopy(self.cache.layers[: self.model.config.num_self_decoder_layers])

    def _go_back(self, tokens: int) -> None:
        layers: list[Any] = self.cache.layers
        layers[: len(self.copied)] = self.copied
        for shared in layers[len(self.copied) :]:
            shared.crop(-tokens)
        self.length -= tokens

    def nbytes(self) -> int:
        """Bytes that the cache and the copy of its small part hold."""
        return super().nbytes() + bytes_of(self.copied)


class SpeculativeEngine(Speculation, Engine):
    """The engine; on a GPU each kind of pass is a CUDA graph, so there are few kinds."""

    most_again = 1

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.uses_graphs = next(model.parameters()).is_cuda
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Any, list[Tensor]]] = {}

    def _small(self) -> list[Tensor]:
        """All that the self-decoder's layers hold."""
        return [t for layer in self.cache.layers if not isinstance(layer, GlobalKV) for t in layer.tensors()]

    def _length(self) -> int:
        return self.cache.length

    def _draft(self, token: int, hidden: Tensor, length: int) -> list[int]:
        self.cache.position.fill_(length - 1)
        return self._replay("draft", self._draft_at_position, self._ids([token]), hidden)[0].tolist()

    def _draft_at_position(self, token: Tensor, hidden: Tensor) -> Tensor:
        model, position = self.model.model, self.cache.position
        kv: Any = self.cache.layers[model.shared_kv.layer_indices[-1]]
        text = kv.first(position + 1)
        return draft(self.model, token, hidden, text, text, model.cross_rotary(position[None]))

    def _pass(self, tokens: list[int], keep: int) -> Any:
        self.cache.make_room(len(tokens))
        self.cache.position.fill_(self.cache.length)
        found = self._replay((len(tokens), keep), partial(self._forward, keep), self._ids(tokens))
        self.cache.length += len(tokens)
        return found

    def _forward(self, keep: int, ids: Tensor) -> Any:
        """As `_pass`, of tokens [1, s] from the cache's position on."""
        positions = (self.cache.position + torch.arange(ids.shape[1], device=ids.device))[None]
        inputs = dict(position_ids=positions, past_key_values=self.cache, use_cache=True)
        if not keep:
            return self.model.model(ids, cross_positions=None, **inputs)
        return self.model(ids, logits_to_keep=keep, **inputs).logits, self.model.model.before_norm

    def _replay(self, kind: Any, run: Callable, *inputs: Tensor) -> Any:
        """run(*inputs), from a graph of that kind on a GPU."""
        if not self.uses_graphs:
            return run(*inputs)
        if kind not in self.recorded:
            own = [t.clone() for t in inputs]
            self.recorded[kind] = (*record(lambda: run(*own), [*self._small(), self.cache.position]), own)
        graph, result, own = self.recorded[kind]
        for mine, given in zip(own, inputs):
            mine.copy_(given)
        graph.replay()
        return result

    def _copy(self) -> None:
        self.copied = self.copied or [torch.empty_like(t) for t in self._small()]
        torch._foreach_copy_(self.copied, self._small())

    def _go_back(self, tokens: int) -> None:
        torch._foreach_copy_(self._small(), self.copied)
        self.cache.length -= tokens

    def nbytes(self) -> int:
        """Bytes that the cache and the copy of its small part hold."""
        return super().nbytes() + sum(t.nbytes for t in self.copied)


def speculative_decoder(
    model: PreTrainedModel, max_length: int, prefill_chunk: int = PREFILL_CHUNK, kv_cache_dtype: str | None = None
) -> SpeculativeModel | SpeculativeEngine:
    """The engine where it applies, as in `decoder_for`. `max_length`: tokens of prompt and continuation."""
    if next(model.parameters()).is_cuda and has_kernels(model.config):
        room = max_length + model.config.mtp_num_layers  # the last drafts
        return SpeculativeEngine(model, room, prefill_chunk=prefill_chunk, kv_cache_dtype=kv_cache_dtype)
    return SpeculativeModel(model, prefill_chunk, kv_cache_dtype)
