"""YOCO (You Only Cache Once, arXiv 2405.05254) for transformers 5: depends on torch and transformers alone.

    X^0 = sqrt(h) E[tokens] -> self-decoder (its mixers: docs/mixers.md) -> one K^,V^ -> cross-decoder -> head

The cache holds the window or the recurrent state (fp32) of each self-decoder layer, and K^,V^ once. A prefill computes
the cross-decoder only for the positions whose logits are asked for (`logits_to_keep`, which generate() sets to 1). With
`shared_kv_sets` above 1 there are so many K^,V^, each for a group of cross layers, and with `shared_kv_sources` they
come from the outputs of several layers. With a `cross_decoder_pattern` some cross layers are gated memory units.

Shapes: b batch, s new tokens, h hidden, H heads, D head width; attention and retention work on [b, H, s, D].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    create_causal_mask,
    create_masks_for_generate,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_yoco import YocoConfig
from .gated_delta_yoco import YocoGatedDeltaNet
from .mamba2_yoco import YocoMamba2
from .mlp_yoco import YocoExperts, YocoMLP, YocoRouter
from .peft_yoco import offer_to_peft
from .recurrence_yoco import YocoRMSNorm, cached_retention, split_heads, widen

offer_to_peft()


def head_norm(config: YocoConfig, head_dim: int) -> nn.Module:
    """The norm of queries or keys, over the width of a head, if the model has it."""
    return YocoRMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()


class YocoRotaryEmbedding(nn.Module):
    """Sines and cosines [b, s, D/2], fp32, for heads of one width."""

    def __init__(self, config: YocoConfig, head_dim: int):
        super().__init__()
        self.config, self.head_dim = config, head_dim
        # As integers, which no cast of the model touches: in 16 bits a frequency is off by radians at position 4096.
        self.reset()

    def reset(self, device: torch.device | str | None = None) -> None:
        """Make the frequencies anew, on this device."""
        self.inv_freq_bits = nn.Buffer(self.compute().view(torch.int32).to(device), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """After a move or cast of the model: to_empty() leaves a buffer undefined, and no checkpoint restores this."""
        super()._apply(fn, recurse)
        if not self.inv_freq_bits.is_meta:
            self.reset(self.inv_freq_bits.device)
        return self

    @property
    def inv_freq(self) -> Tensor:
        """Angles per position, fp32 [D/2]."""
        return self.inv_freq_bits.view(torch.float32)

    def compute(self) -> Tensor:
        """`inv_freq` as the configuration has it."""
        if self.config.rope_variant == "yoco":
            exponents = torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float64)
        else:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        frequencies = 1.0 / self.config.rope_theta**exponents
        if self.config.use_rope_scaling:
            turns = 8192 * frequencies / (2 * math.pi)
            unchanged = ((turns - 1) / 3).clamp(0, 1)
            frequencies *= unchanged + (1 - unchanged) / self.config.rope_scaling_factor
        return frequencies.float()

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(position_ids.device)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate pairs of x [b, H, s, D]; fp32 arithmetic, x's dtype back."""
    cos, sin = (t.unsqueeze(1) for t in rotary)
    wide = widen(x)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        y = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        y = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return y.to(x.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; returns ([b, s, H, D], probabilities)."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = widen(scores).softmax(-1).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def documents_of(
    position_ids: Tensor | None, batch: int, length: int, cu_seq_lens_q: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Which document of its row each token belongs to, non-decreasing integers [b, s]; None: one document a row.

    Packed documents are known, as in transformers, by their boundaries in the flattened batch (`cu_seq_lens_q`), by
    their numbers (`seq_idx` [b, s]), or by position_ids that do not count on.
    """
    if cu_seq_lens_q is not None:
        tokens = torch.arange(batch * length, device=cu_seq_lens_q.device, dtype=cu_seq_lens_q.dtype)
        documents = torch.bucketize(tokens, cu_seq_lens_q[1:], right=True).view(batch, length)
    elif seq_idx is not None:
        documents = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(-1), (1, 0)).expand(batch, -1)
    elif position_ids is not None:
        return find_packed_sequence_indices(position_ids.expand(batch, -1))
    else:
        return None
    return documents if is_tracing(documents) or (documents[:, 0] != documents[:, -1]).any() else None


def positions_in(documents: Tensor) -> Tensor:
    """The place of each token in its document [b, s]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return places - (places * starts).cummax(-1).values


def flash_boundaries(documents: Tensor) -> dict[str, Any]:
    """The documents as flash attention's arguments in transformers."""
    ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True).flatten().nonzero().flatten() + 1
    boundaries = F.pad(ends, (1, 0)).int()
    longest = int(boundaries.diff().max())
    both = {"cu_seq_lens": boundaries, "max_length": longest}
    return {f"{name}_{side}": value for name, value in both.items() for side in "qk"}


def check_padding(attention_mask: Tensor) -> None:
    """Raise ValueError for a mask [b, keys] that numbers documents: transformers takes each number but 0 for a 1."""
    if attention_mask.dtype != torch.bool and not is_tracing(attention_mask) and (attention_mask > 1).any():
        raise ValueError(
            "attention_mask holds numbers above 1: it is 0 for padding and 1 for tokens. For packed documents give "
            "position_ids that start again in each, and no mask"
        )


def ends_in_padding(attention_mask: Tensor | None) -> bool:
    """Whether the last token of a row is padding, by a mask [b, keys]."""
    if attention_mask is None or attention_mask.ndim != 2 or is_tracing(attention_mask):
        return False
    return bool((attention_mask[:, -1] == 0).any())


def recurrent_mask(attention_mask: Tensor | None, inputs_embeds: Tensor, **others: Any) -> Tensor | None:
    """transformers' mask of new tokens [b, s], which takes a single one for no padding; None: there is no padding."""
    if attention_mask is not None and inputs_embeds.shape[1] == 1 and ends_in_padding(attention_mask):
        return attention_mask[:, -1:]
    return create_recurrent_attention_mask(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **others)


def check_one_document(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for positions that start again where transformers takes a row for one document.

    position_ids [b or 1, s]; attention_mask [b, keys] or None. Padding may have any position.
    """
    if is_tracing(position_ids) or position_ids.shape[1] == 1:
        return
    falls = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].to(falls.device, torch.bool)
        falls = falls & real[:, 1:] & real[:, :-1]
    if falls.any():
        what = "past_key_values" if attention_mask is None else "attention_mask"
        raise ValueError(
            f"position_ids start again within a row: packed documents cannot be told apart with {what}; give none"
        )


class YocoAttention(nn.Module):
    """What both kinds of softmax attention share: queries, output, and transformers' attention interface."""

    sliding_window: int | None = None

    def __init__(self, config: YocoConfig, layer_idx: int, heads: int, groups: int, head_dim: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head_dim
        self.scaling = head_dim**-0.5
        self.num_key_value_groups = heads // groups
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = head_norm(config, head_dim)

    def query(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.q_norm(split_heads(self.q_proj(x), self.head_dim)), rotary, self.config.rope_interleaved)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        window = self.sliding_window
        o, weights = attention(self, q, k, v, mask, scaling=self.scaling, sliding_window=window, dropout=0.0, **kwargs)
        return self.o_proj(o.reshape(*o.shape[:2], -1).contiguous()), weights


class YocoSlidingAttention(YocoAttention):
    """Sliding-window attention of a self-decoder layer."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        heads, groups = config.self_decoder_heads, config.self_decoder_key_value_heads
        super().__init__(config, layer_idx, heads, groups, config.self_decoder_head_dim)
        self.sliding_window = config.sliding_window
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=config.qkv_bias)
        self.k_norm = head_norm(config, self.head_dim)

    def forward(self, x, rotary, mask, past_key_values: Cache | None = None, documents=None, **kwargs):
        q = self.query(x, rotary)
        k = self.k_norm(split_heads(self.k_proj(x), self.head_dim))
        k = rotate(k, rotary, self.config.rope_interleaved)
        v = split_heads(self.v_proj(x), self.head_dim)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.attend(q, k, v, mask, **kwargs)


class YocoGatedRetention(nn.Module):
    """Gated retention of a self-decoder layer: out = (silu(x W_g) * RMS(o)) W_o."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.self_decoder_head_dim
        width = config.self_decoder_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.decay_proj = nn.Linear(config.hidden_size, config.self_decoder_heads, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.head_norm = YocoRMSNorm(self.head_dim, config.rms_norm_eps, affine=False)

    def forward(self, x, rotary, mask, past_key_values: Cache | None = None, documents=None, **kwargs):
        q, k, v = (split_heads(projection(x), self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))
        interleaved = self.config.rope_interleaved
        q, k = rotate(q, rotary, interleaved), rotate(k, rotary, interleaved)
        # The state and the decay never see 16 bits.
        log_decay = F.logsigmoid(widen(self.decay_proj(x))).transpose(1, 2) / self.config.decay_temperature
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        o = cached_retention(q, k, v, log_decay, mask=mask, layer=layer, documents=documents)
        y = self.head_norm(o).transpose(1, 2).flatten(2)
        return self.o_proj(F.silu(self.g_proj(x)) * y), y


class YocoSharedKV(nn.Module):
    """The sets of K^,V^ projected from the output of one source, the self-decoder's layer number `source`; also their
    global cache entries.

    Rows of the projections are ordered by head, and for one head by set: tensor parallelism cuts between heads.
    """

    def __init__(self, config: YocoConfig, source: int):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        # Each set's place in the cache: that of the first layer that reads it.
        of_all, names = [i for i, mode in enumerate(config.kv_sharing_modes) if mode == "store"], [*config.kv_names]
        sets, place = len(of_all) // len(names), names.index(source)
        self.layer_indices = of_all[place * sets :][:sets]
        width = config.num_key_value_heads * sets * self.head_dim
        self.norm = YocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_norm = nn.ModuleList(head_norm(config, self.head_dim) for _ in self.layer_indices)

    def forward(self, x, rotary, past_key_values: Cache | None = None) -> list[tuple]:
        x, sets = self.norm(x), len(self.layer_indices)
        k, v = (split_heads(projection(x), self.head_dim) for projection in (self.k_proj, self.v_proj))
        pairs = [
            (rotate(norm(k[:, i::sets]), rotary, self.config.rope_interleaved), v[:, i::sets])
            for i, norm in enumerate(self.k_norm)
        ]
        if past_key_values is None:
            return pairs
        return [past_key_values.update(*pair, index) for pair, index in zip(pairs, self.layer_indices)]


class YocoCrossAttention(YocoAttention):
    """Queries of one cross-decoder layer over a set of the shared K^,V^."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def forward(self, x, rotary, mask, k, v, **kwargs):
        return self.attend(self.query(x, rotary), k, v, mask, **kwargs)


class YocoMemoryUnit(nn.Module):
    """A cross-decoder layer's mixer that attends to nothing (arXiv 2507.06607): out = (m * silu(x W_1)) W_2, with the
    memory m what the last recurrent layer of the self-decoder reads from its state, before its own gate."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.memory_width, bias=False)
        self.out_proj = nn.Linear(config.memory_width, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, memory, **kwargs):
        return self.out_proj((F.silu(widen(self.in_proj(x))) * widen(memory)).to(x.dtype)), None


class YocoLayer(GradientCheckpointingLayer):
    """Pre-norm layer: mixer, FFN, a residual around each. The source of gated memory units gives its memory, too."""

    def __init__(self, config: YocoConfig, mixer: nn.Module, index: int):
        super().__init__()
        self.mixer = mixer
        self.gives_memory = index == config.memory_source
        self.input_layernorm = YocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = YocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.layers_with_experts[index]
        self.mlp = YocoExperts(config) if has_experts else YocoMLP(config, config.intermediate_size)

    def forward(self, x, *shared, rotary=None, mask=None, **kwargs):
        # K,V and memory come by position: re-entrant checkpointing gives gradients to nothing else.
        mixed, memory = self.mixer(self.input_layernorm(x), rotary, mask, *shared, **kwargs)
        x = x + mixed
        x = x + self.mlp(self.post_attention_layernorm(x))
        return (x, memory) if self.gives_memory else x


class YocoPreTrainedModel(PreTrainedModel):
    config: YocoConfig
    config_class = YocoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["YocoLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"mtp_layers\."]  # of multi-token prediction: no logits depend on them
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": [YocoLayer],
        "attentions": [YocoSlidingAttention, YocoCrossAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, YocoRotaryEmbedding):
            # Loading builds the model without memory and restores no buffer that is not saved.
            init.copy_(module.inv_freq_bits, module.compute().view(torch.int32))
        if isinstance(module, YocoRouter | YocoMamba2 | YocoGatedDeltaNet):
            module.reset()


class YocoModel(YocoPreTrainedModel):
    """The decoder without its head."""

    shared_kv: YocoSharedKV  # that of the last source

    def __init__(self, config: YocoConfig):
        super().__init__(config)
        border = config.num_self_decoder_layers
        kinds = {
            "gated_retention": YocoGatedRetention,
            "sliding_window": YocoSlidingAttention,
            "mamba2": YocoMamba2,
            "gated_delta_net": YocoGatedDeltaNet,
        }
        mixers = [kinds[mixer] for mixer in config.self_decoder_mixers]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_layers = nn.ModuleList(YocoLayer(config, mixer(config, i), i) for i, mixer in enumerate(mixers))
        for source, name in config.kv_names.items():
            self.add_module(name, YocoSharedKV(config, source))
        of_letters = {"A": YocoCrossAttention, "G": YocoMemoryUnit}
        self.cross_layers = nn.ModuleList(
            YocoLayer(config, of_letters[letter](config, i), i) for i, letter in enumerate(config.cross_letters, border)
        )
        self.norm = YocoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_rotary = YocoRotaryEmbedding(config, config.self_decoder_head_dim)
        self.cross_rotary = YocoRotaryEmbedding(config, config.head_dim)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cross_positions: int | None = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """`cross_positions` n > 0 ends the prefill early: the cross-decoder runs for the last n positions alone, and
        `last_hidden_state` is [b, n, h]; None: for no position at all. The cache is complete either way."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        count, kinds = self.config.num_self_decoder_layers, self.config.layer_types
        if past_key_values is not None and "linear_attention" in kinds and len(past_key_values.layers) < count:
            raise ValueError("past_key_values has no states: make it with DynamicCache(config=model.config)")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, shared = x.shape[1], self.shared_kv.layer_indices[0]
        documents, seq_idx = None, kwargs.pop("seq_idx", None)
        if past_key_values is None and (attention_mask is None or getattr(attention_mask, "ndim", 4) == 4):
            documents = documents_of(position_ids, x.shape[0], length, kwargs.get("cu_seq_lens_q"), seq_idx)
        elif getattr(attention_mask, "ndim", 2) == 2:
            if attention_mask is not None and length > 1:
                check_padding(attention_mask)
            if position_ids is not None:
                check_one_document(position_ids, attention_mask)
        # No cache holds several documents a row. A compiled graph cannot know how many there are.
        if use_cache and past_key_values is None and (documents is None or is_tracing(documents)):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None and documents is not None:
            position_ids = positions_in(documents)
        if position_ids is None:
            seen = past_key_values.get_seq_length(shared) if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=x.device) + seen).unsqueeze(0)
        kept = 0 if cross_positions is None else min(cross_positions, length) or length
        last = kept
        if documents is not None:
            kept = length if kept else 0  # masks of the last positions know no documents
            if is_flash_attention_requested(self.config):
                kwargs = flash_boundaries(documents) | kwargs
        self_masks, cross_mask = self._masks(x, attention_mask, past_key_values, position_ids, kept, documents)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)

        own_rotary, rotary = self.self_rotary(position_ids), self.cross_rotary(position_ids)
        sets, memory = self._project(0, x, rotary, past_key_values), None
        for index, (layer, kind) in enumerate(zip(self.self_layers, self.config.layer_types), 1):
            own = {"mask": self_masks[kind], "past_key_values": past_key_values, "documents": documents}
            x = layer(x, rotary=own_rotary, **own, **kwargs)
            if layer.gives_memory:
                x, memory = x
                memory = memory[:, length - kept :].to(x.dtype)
            sets += self._project(index, x, rotary, past_key_values)
        x, rotary = x[:, length - kept :], tuple(t[:, length - kept :] for t in rotary)
        for index, (layer, letter) in enumerate(zip(self.cross_layers, self.config.cross_letters if kept else "")):
            read = (memory,) if letter == "G" else sets[index * len(sets) // len(self.cross_layers)]
            x = layer(x, *read, rotary=rotary, mask=cross_mask, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x[:, kept - last :]), past_key_values=past_key_values
        )

    def _project(self, source: int, x, rotary, past_key_values) -> list[tuple]:
        """The sets of K^,V^ that are projected behind so many layers."""
        name = self.config.kv_names.get(source)
        return getattr(self, name)(x, rotary, past_key_values) if name else []

    def _masks(self, x, attention_mask, past_key_values, position_ids, kept, documents):
        """(those of the self-decoder by kind of layer, that of the cross-decoder's last `kept` queries)."""
        if isinstance(attention_mask, dict):  # of one query, by create_masks_for_generate
            return attention_mask, attention_mask["full_attention"]
        if documents is not None:
            past_key_values, position_ids = None, positions_in(documents)
        common = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks: dict[str, Callable] = {
            "linear_attention": recurrent_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        kinds = dict.fromkeys(self.config.layer_types[: self.config.num_self_decoder_layers])
        own = {kind: masks[kind](**common) for kind in kinds}
        if kept == x.shape[1]:
            return own, create_causal_mask(**common)
        return own, self._mask_of_last(x, attention_mask, past_key_values, kept) if kept else None

    def _mask_of_last(self, x, attention_mask, past_key_values, kept):
        """The causal mask of the last `kept` of the new queries over all keys."""
        if attention_mask is not None and attention_mask.ndim == 4:
            return attention_mask[:, :, -kept:]
        implementation = self.config._attn_implementation
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None
        length, shared = x.shape[1], self.shared_kv.layer_indices[0]
        keys, first_key, seen = length, 0, 0
        if past_key_values is not None:
            keys, first_key = past_key_values.get_mask_sizes(length, shared)
            seen = past_key_values.get_query_offset(shared)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=x.shape[0],
            q_length=kept,
            kv_length=keys,
            q_offset=seen + length - kept,
            kv_offset=first_key,
            mask_function=causal_mask_function,
            attention_mask=None if attention_mask is None else attention_mask.to(x.device, torch.bool),
            # torch's own causal mask is aligned to the first key, so only a single query may do without a mask; and
            # only where every key was written, unlike in a static cache.
            allow_is_causal_skip=kept == 1 and not getattr(past_key_values, "is_compileable", False),
            dtype=x.dtype,
            config=self.config,
            use_vmap=False,
            device=x.device,
        )


class YocoForCausalLM(YocoPreTrainedModel, GenerationMixin):
    """YOCO with its language-model head.

    Attributes:
        cross_decoder_positions: "all" has training compute all positions, and return all logits, for a trainer that
            reads them beside the labels; "loss", those from the first loss on.
    """

    cross_decoder_positions = "loss"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: YocoConfig):
        super().__init__(config)
        # A recurrent state cannot be rolled back: assisted decoding is then refused with a clear error.
        self._is_stateful = "linear_attention" in config.layer_types
        self.model = YocoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(**kwargs) -> dict | Tensor | None:
        """Masks of one step with a static cache, by kind of layer. A longer piece makes its own: it may exit early."""
        one = kwargs["inputs_embeds"].shape[1] == 1 and not ends_in_padding(kwargs["attention_mask"])
        return create_masks_for_generate(**kwargs) if one else kwargs["attention_mask"]

    def _get_static_cache_init_shape(self) -> None:
        """A static cache takes each layer's shape from what it first holds: the two halves have heads of their own."""

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
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all of them; a tensor: those positions).

        In training with `labels` 0 means: from the first position with a loss on, as in a prompt with labels of -100.
        The cross-decoder is not computed before it, which changes neither the loss nor any gradient.
        """
        only_loss = self.training and self.cross_decoder_positions == "loss"
        if labels is not None and only_loss and isinstance(logits_to_keep, int) and logits_to_keep == 0:
            logits_to_keep = positions_from_first_loss(labels)
            labels = labels[:, -logits_to_keep:]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cross_positions=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def positions_from_first_loss(labels: Tensor) -> int:
    """Last positions of `labels` [b, s] from which the first loss on can be computed, at least one.

    The loss of labels[:, i] is computed at position i - 1; labels[:, 0] has none.
    """
    if is_tracing(labels):  # a compiled graph has one length
        return labels.shape[1]
    has_loss = (labels[:, 1:] != -100).any(0)
    first = int(has_loss.int().argmax()) if bool(has_loss.any()) else labels.shape[1] - 1
    return labels.shape[1] - first


__all__ = ["YocoForCausalLM", "YocoModel", "YocoPreTrainedModel"]
