"""YOCO in vLLM: windows or states in the self-decoder, ONE global K,V cache for the whole cross-decoder.

(With `shared_kv_sets` above 1 one for each set, which a group of cross layers reads.)

All cross layers share caches of `SharedKV`'s writers, so they are the trailing run of sharing layers that
`--kv-sharing-fast-prefill` knows: with it, prompt tokens never enter the cross-decoder, except those whose logits are
needed.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import IsHybrid
from vllm.model_executor.models.utils import maybe_prefix
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

from yoco_vllm.layers import CrossAttention, Layer, SharedKV, SlidingAttention, state_shape

# Weight of the checkpoint -> (fused parameter here, which part of it).
FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def self_decoder_mixer(kind: str) -> type[nn.Module]:
    """The class of the self-decoder's mixers. Raises ValueError without its kernels."""
    if kind == "sliding_window":
        return SlidingAttention
    try:
        from yoco_vllm.retention import GatedRetention
    except ModuleNotFoundError as error:
        raise ValueError(
            f"gated retention runs on yoco-megatron's kernels, and there is no {error.name}: install the trainer, too, "
            "with --no-deps"
        ) from error
    return GatedRetention


class YocoModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        mixer = self_decoder_mixer(config.self_decoder)
        split_layer = config.num_self_decoder_layers
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )

        def layer(name: str, mixer: type, *more: str) -> Layer:
            return Layer(config, vllm_config, name, mixer(config, vllm_config, f"{name}.mixer", *more))

        # vLLM needs exactly one number in a name, all different: the owners of the caches count as layers.
        sets, cross = getattr(config, "shared_kv_sets", 1), config.num_hidden_layers - split_layer
        writers = [f"{prefix}.shared_kv.{split_layer + i}.attn" for i in range(sets)]
        self.self_layers = nn.ModuleList(layer(f"{prefix}.self_layers.{i}", mixer) for i in range(split_layer))
        self.shared_kv = SharedKV(config, vllm_config, f"{prefix}.shared_kv", writers)
        self.cross_layers = nn.ModuleList(
            layer(f"{prefix}.cross_layers.{split_layer + sets + i}", CrossAttention, writers[i * sets // cross])
            for i in range(cross)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fast_prefill = vllm_config.cache_config.kv_sharing_fast_prefill
        self.rows = {"self": 0, "cross": 0}  # rows through each half so far, for check.py

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [t, h]; with fast prefill, rows whose logits are not needed are not final."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.scale
        for layer in self.self_layers:
            x = layer(positions, x)
        self.shared_kv(positions, x)
        wanted, count = self._wanted_rows()
        y, at = (x, positions) if wanted is None else (x[wanted], positions[wanted])
        if get_forward_context().attn_metadata is not None:
            self.rows["self"] += x.shape[0]
            self.rows["cross"] += y.shape[0]
        for layer in self.cross_layers:
            y = layer(at, y)
        if wanted is not None:
            x = x.clone()
            x[wanted[:count]] = y[:count]
            y = x
        return self.norm(y)

    def _wanted_rows(self) -> tuple[Tensor | None, int]:
        """(rows that need the cross-decoder, or None for all; how many of them are not padding)."""
        metadata = get_forward_context().attn_metadata
        if not self.fast_prefill or metadata is None:
            return None, 0
        of_cross = metadata[self.cross_layers[-1].mixer.attn.layer_name]
        if not isinstance(of_cross, KVSharingFastPrefillMetadata):
            return None, 0
        return of_cross.logits_indices_padded, of_cross.num_logits_indices


class YocoForCausalLM(nn.Module, IsHybrid):
    """YOCO with its head, under the name in an exported model's config.json."""

    is_hybrid = True  # windows are none: `register` tells vLLM so
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = YocoModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Padding of the vocabulary. vLLM itself reads only sampling parameters from a generation config.
        forbidden = vllm_config.model_config.try_get_generation_config().get("suppress_tokens") or []
        self.register_buffer("forbidden", torch.tensor(forbidden, dtype=torch.long), persistent=False)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        """Of one retention layer, on each rank."""
        config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        return (state_shape(config, ranks),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc]:
        """How prefix caching copies a state from block to block."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [t, h], without the scale, of token ids [t]."""
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits.index_fill_(-1, self.forbidden, -torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's tensors; returns the names of the parameters that were filled."""
        parameters, filled = dict(self.named_parameters()), set()
        for name, weight in weights:
            if name.startswith("model.mtp_layers."):  # of multi-token prediction, which is for training
                continue
            part = name.split(".")[-2]
            fused, shard = FUSED.get(part, (None, None))
            target = name.replace(f".{part}.", f".{fused}.") if fused else name
            if fused and target in parameters:
                parameters[target].weight_loader(parameters[target], weight, shard)
            else:
                target = name
                loader = getattr(parameters[target], "weight_loader", default_weight_loader)
                loader(parameters[target], weight)
            filled.add(target)
        return filled
