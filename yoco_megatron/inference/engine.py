"""Decoding limited by memory bandwidth: a prompt in chunks, then one CUDA graph replay per token.

A mixture of experts decides by each token which of them run: its steps are no graph.

    engine = Engine(model, max_length=1_050_000)
    logits = engine.prefill(ids)                    # [b, vocabulary]
    logits = engine.step(logits.argmax(-1))         # and again

Works for YocoForCausalLM and for transformers' decoder-only models; on a CPU without the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.inference.cache import IMPLEMENTATION, BlockCache, RetentionState

PREFILL_CHUNK = 32768


def has_kernels(config: Any) -> bool:
    """Whether the decoding kernel supports the model's head widths: powers of two, at least 16."""
    widths = {getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        widths.add(getattr(config, "self_decoder_head_dim", 16))
    return all(width >= 16 and width & (width - 1) == 0 for width in widths)


def forward(model: PreTrainedModel, ids: Tensor, last: bool = True, **inputs: Any) -> Any:
    """Run tokens [b, s] into the cache; returns logits [b, vocabulary] after them if `last`, else None.

    All but the last chunk of a prompt skip a YOCO's cross-decoder, and any model's head.
    """
    if last:
        return model(ids, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
    early = {"cross_positions": None} if model.config.model_type == YocoConfig.model_type else {}
    model.base_model(ids, use_cache=True, **early, **inputs)
    return None


class Engine:
    """One batch of sequences of equal length.

    Args:
        model: a causal language model of transformers', in evaluation mode; its attention implementation is set.
        max_length: tokens of prompt and continuation together.
        capacity, reserve: see BlockCache; set `reserve` for models in which every layer attends to earlier chunks.
        kv_cache_dtype: see BlockCache.
        prefill_chunk: tokens of the prompt per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int,
        *,
        capacity: int = 4096,
        reserve: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        kv_cache_dtype: str | None = None,
    ) -> None:
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.prefill_chunk = model, prefill_chunk
        self.cache = BlockCache(model.config, max_length, capacity, reserve, kv_cache_dtype)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run prompts [b, T]; returns logits [b, vocabulary] after the last token. Raises ValueError for a mask,
        and the second time."""
        if mask is not None:
            raise ValueError("the engine needs prompts of one length: use CachedModel for others")
        if ids.shape[1] == 0:
            raise ValueError("a prompt needs at least one token")
        if self.cache.decoding:
            raise ValueError("an engine takes one batch of prompts: make another for the next")
        *chunks, last = ids.split(self.prefill_chunk, dim=1)
        for chunk in chunks:
            self.take(chunk, last=False)
        logits = self.take(last)
        self.cache.start_decoding(ids.device)
        return logits

    @torch.no_grad()
    def take(self, chunk: Tensor, last: bool = True) -> Any:
        """Run a chunk [b, s] of a prompt; returns logits [b, vocabulary] if it is the last one."""
        start, end = self.cache.length, self.cache.length + chunk.shape[1]
        positions = torch.arange(start, end, device=chunk.device)[None]
        logits = forward(self.model, chunk, last, position_ids=positions, past_key_values=self.cache)
        self.cache.advance(chunk.shape[1])
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Run one token [b] of every sequence; returns logits [b, vocabulary], which the next step overwrites."""
        self.cache.make_room()
        if not tokens.is_cuda or getattr(self.model.config, "num_experts", None):
            logits = self._one(tokens)
        else:
            if self.graph is None:
                self.graph = self._capture(tokens)
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        self.cache.length += 1
        return logits

    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return self.cache.nbytes()

    def _one(self, tokens: Tensor) -> Tensor:
        positions = self.cache.position[None]
        logits = forward(self.model, tokens[:, None], position_ids=positions, past_key_values=self.cache)
        self.cache.position += 1
        return logits

    def _capture(self, tokens: Tensor) -> torch.cuda.CUDAGraph:
        """Record a step. Warm-up steps write K,V that the real step overwrites."""
        self.tokens = tokens.clone()
        layers = [layer for layer in self.cache.layers if isinstance(layer, RetentionState)]
        states = [state for layer in layers for state in layer.tensors()]
        graph, self.logits = record(lambda: self._one(self.tokens), [*states, self.cache.position])
        return graph


def record(run: Callable[[], Any], held: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(a CUDA graph of `run`, its results, which each replay writes). Warm-up runs leave `held` as it was."""
    saved = [tensor.clone() for tensor in held]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels, allocates workspaces
            run()
            for tensor, before in zip(held, saved):
                tensor.copy_(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
