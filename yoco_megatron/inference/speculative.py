"""Self-speculative generation: the layers of multi-token prediction draft, and one pass of the model checks.

With t the text so far and h the hidden state of the token before its last one, layer N drafts the N-th token after the
text (model/multi_token_prediction.py):

    h   <- layer_N(h, E[last token or draft]; shared K,V of the text before its last token),   argmax head(norm(h))

The model then runs the last token and the drafts at once. Where the next token, however it is chosen, is the draft,
its logits are there already. Where not, the caches go back to before that pass: shared K,V are cut off, the
self-decoder's small ones were copied, and the next pass begins with the tokens of this one that are part of the text.
The text is that of a decoder without drafts, as all logits that choose it are the model's.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from yoco_megatron.hf.modeling_yoco import YocoCrossAttention, YocoForCausalLM, YocoLayer, YocoRMSNorm
from yoco_megatron.inference.engine import PREFILL_CHUNK
from yoco_megatron.inference.generation import CachedModel, bytes_of
from yoco_megatron.inference.quantized_cache import read

MOST_AGAIN = 8
"""Tokens that a pass takes again; more than these enter the caches for good, in a pass without the cross-decoder."""


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
    """Add the layers of multi-token prediction, without their weights, where the names of an export have them."""
    model.model.mtp_layers = nn.ModuleList(MultiTokenLayer(model.config, d) for d in range(model.config.mtp_num_layers))


class SpeculativeModel(CachedModel):
    """A decoder for one text.

    Args:
        model: a YOCO with its layers of multi-token prediction (`attach`).

    Attributes:
        verified, accepted: drafts that the text has come to, and those of them that are in it.
    """

    def __init__(
        self, model: PreTrainedModel, prefill_chunk: int = PREFILL_CHUNK, kv_cache_dtype: str | None = None
    ) -> None:
        super().__init__(model, prefill_chunk, kv_cache_dtype)
        self.verified = self.accepted = 0
        # What went through the model since the copy: `confirmed` tokens of the text, then drafts.
        self.copied: list[Any] = []
        self.ran: list[int] = []
        self.confirmed = 0
        self.hidden = self.logits = torch.empty(0)  # of the last positions, up to that of the last draft
        model.model.norm.register_forward_pre_hook(self._keep)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        self.hidden = inputs[0]  # the model returns what the norm made of it

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `CachedModel`. Raises ValueError for several prompts."""
        if len(ids) > 1:
            raise ValueError(f"--speculative continues one prompt, not {len(ids)}: leave it out, or the other prompts")
        return super().prefill(ids, mask)

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
        drafts = self._draft(token)
        again: list[int] = []
        if self.confirmed < len(self.ran):
            again = self.ran[: self.confirmed]
            self._go_back()
        if len(again) > MOST_AGAIN:
            self._forward(self._ids(again), last=False)
            again = []
        self.copied = deepcopy(self.cache.layers[: self.model.config.num_self_decoder_layers])
        self.ran, self.confirmed = [*again, token, *drafts], len(again) + 1
        ids = self._ids(self.ran)
        self.logits = self.model(ids, use_cache=True, logits_to_keep=1 + len(drafts), **self._places(ids)).logits

    def _draft(self, token: int) -> list[int]:
        """What follows the text and `token`, by each layer one more."""
        model, found = self.model.model, [token]
        length = self.length + self._last + 1
        shared = self.cache.layers[model.shared_kv.layer_indices[-1]]
        k, v = read(shared, length, self.hidden.dtype)
        rotary = model.cross_rotary(torch.tensor([[length - 1]], device=k.device))
        hidden = self.hidden[:, self._last, None]
        scale = self.model.config.hidden_size**0.5 if self.model.config.scale_embedding else 1.0
        for layer in model.mtp_layers:
            embedding = model.embed_tokens(self._ids(found[-1:])) * scale
            hidden = layer(layer.join(hidden, embedding), k, v, rotary=rotary)
            found.append(int(self.model.lm_head(model.norm(hidden)).argmax()))
        return found[1:]

    def _go_back(self) -> None:
        """The caches of before the last pass."""
        layers: list[Any] = self.cache.layers
        layers[: len(self.copied)] = self.copied
        for shared in layers[len(self.copied) :]:
            shared.crop(-len(self.ran))
        self.length -= len(self.ran)

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)

    def nbytes(self) -> int:
        """Bytes that the cache and the copy of its small part hold."""
        return super().nbytes() + bytes_of(self.copied)
