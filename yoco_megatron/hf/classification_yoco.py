"""YOCO with a classification head: one label, or one number, for a sequence.

It is read at the last token, so that the cross-decoder is computed from the first row's last token on alone.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_yoco import YocoConfig
from .modeling_yoco import YocoModel, YocoPreTrainedModel


class YocoForSequenceClassification(YocoPreTrainedModel):
    """YocoModel and a linear layer from its last token to `config.num_labels` numbers."""

    def __init__(self, config: YocoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 2
        self.model = YocoModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [b, num_labels]; labels [b], or [b, num_labels], as transformers' problem_type says."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError("give either input_ids or inputs_embeds")
        last, length = self._last_tokens(given, attention_mask), given.shape[1]
        computed = length if is_tracing(last) else length - int(last.min())
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cross_positions=computed,
            **kwargs,
        )
        states = outputs.last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        logits = self.score(states[rows, last.to(states.device) - (length - states.shape[1])])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """Index [b] of the last token of each row of ids or embeddings: by the padding's mask, else by its token."""
        rows, length = given.shape[:2]
        if mask is not None and mask.ndim == 2:
            is_token = mask[:, -length:].bool()  # a cache has tokens before these
        elif given.ndim == 2 and self.config.pad_token_id is not None:
            is_token = given != self.config.pad_token_id
        elif rows == 1:
            return torch.full((1,), length - 1, device=given.device)
        else:
            raise ValueError(
                "several sequences need an attention_mask, or config.pad_token_id, to find their last token"
            )
        places = torch.arange(length, device=given.device)
        return (is_token * places).argmax(-1)


__all__ = ["YocoForSequenceClassification"]
