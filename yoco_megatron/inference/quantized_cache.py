"""transformers' cache with the shared K,V in one byte a value (ops/attention/quantized.py)."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from yoco_megatron.ops.attention.quantized import pack, unpack


class QuantizedKV(DynamicLayer):
    """K,V as bytes, from which each call gets them anew in the model's dtype."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add K,V [b, G, s, D]; returns those of all tokens."""
        super().update(pack(key_states, self.kind), pack(value_states, self.kind))
        return read(self, self.get_seq_length(), key_states.dtype)


def read(layer: Any, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V [b, G, length, D] of the first tokens that a layer of transformers' caches holds."""
    k, v = layer.keys[:, :, :length], layer.values[:, :, :length]
    return (unpack(k, layer.kind, dtype), unpack(v, layer.kind, dtype)) if isinstance(layer, QuantizedKV) else (k, v)


def dynamic_cache(config: Any, kv_cache_dtype: str | None = None) -> DynamicCache:
    """transformers' cache for a model; `kv_cache_dtype`: of a YOCO's shared K,V, see `quantized.FORMATS`."""
    cache = DynamicCache(config=config)
    if kv_cache_dtype:
        for index, mode in enumerate(config.kv_sharing_modes):
            if mode == "store":
                cache.layers[index] = QuantizedKV(kv_cache_dtype)
    return cache
