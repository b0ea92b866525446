"""One softmax attention as the sum of parts: some of the queries over some of the keys, merged by their log-sum-exp.

Each part's output and its gradient of the queries have the queries' dtype, as kernels return them; log-sum-exps are in
fp32 or wider.

Shapes: q, o [b, H, T, D], lse [b, H, T], keys and values of a part [b, G, S, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_megatron.config.rules import flag_against_parts
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.attention import partial


@dataclass(frozen=True)
class Part:
    """Queries [first, stop) of all, over keys and values of their own.

    causal: query i attends to keys 0..i; else all attend to all.
    """

    first: int
    stop: int
    causal: bool

    @property
    def rows(self) -> slice:
        """Of the queries."""
        return slice(self.first, self.stop)


def is_supported(config: YOCOConfig, device: torch.device, multiple: int) -> bool:
    """True if parts can do all that the config asks for; their numbers of queries and of keys are multiples."""
    return flag_against_parts(config) is None and partial.is_supported(
        device, config.params_dtype, config.kv_channels, multiple
    )


def forward(
    q: Tensor, keys_and_values: Sequence[Tensor], parts: Sequence[Part], scale: float
) -> tuple[Tensor, Tensor, list[tuple]]:
    """(o, lse, what `backward` takes) of all parts; a query without any key gets o = 0, lse = -inf.

    keys_and_values: k, v of the first part, k, v of the second, ...
    """
    merged: tuple[Tensor, Tensor] | None = None
    rng_states: list[tuple] = []
    for part, k, v in zip(parts, keys_and_values[::2], keys_and_values[1::2]):
        if part.first == part.stop:
            rng_states.append(())
            continue
        part_o, part_lse, rng_state = partial.forward(q[:, :, part.rows], k, v, part.causal, scale)
        rng_states.append(rng_state)
        if merged is None and part_o.shape == q.shape:
            merged = part_o, part_lse
            continue
        o, lse = merged = merged or _of_no_key(q)
        partial.merge_(o[:, :, part.rows], lse[..., part.rows], part_o, part_lse)
    return *(merged or _of_no_key(q)), rng_states


def _of_no_key(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"), dtype=dtype)


def backward(
    do: Tensor,
    q: Tensor,
    keys_and_values: Sequence[Tensor],
    o: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    rng_states: Sequence[tuple],
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """(dq, [dk, dv of the first part, of the second, ...]); o, lse and do are those of the merged attention."""
    dq, gradients = None, []
    for part, rng_state, k, v in zip(parts, rng_states, keys_and_values[::2], keys_and_values[1::2]):
        if part.first == part.stop:
            gradients += [torch.zeros_like(k), torch.zeros_like(v)]
            continue
        at = part.rows
        part_dq, dk, dv = partial.backward(
            do[:, :, at], q[:, :, at], k, v, o[:, :, at], lse[..., at], rng_state, part.causal, scale
        )
        gradients += [dk, dv]
        if dq is None and part_dq.shape == q.shape:
            dq = part_dq
            continue
        dq = torch.zeros_like(q) if dq is None else dq
        dq[:, :, at].add_(part_dq)
    return torch.zeros_like(q) if dq is None else dq, gradients


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[s, b, heads, D] -> [b, heads, s, D], views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def sequence_first(*tensors: Tensor) -> list[Tensor]:
    """The inverse of `heads_first`."""
    return [x.permute(2, 0, 1, 3) for x in tensors]
