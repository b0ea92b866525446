"""Cross attention over packed documents as the layers do it, and with a mask: outputs and gradients, to compare."""

from collections.abc import Callable

import torch

from yoco_megatron.model.cross_decoder.document_attention import document_attention
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader
from yoco_megatron.parallel.context.document_calls import DocumentCalls
from yoco_megatron.parallel.context.query_shard import QueryShard, Runs, positions_of
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""(query [m, b, H, D] of all queries, gradient of the output [m, b, H * D]) of each layer."""


def shard_of(
    *packs: list[int], group: torch.distributed.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> SequenceShard:
    """Of packs of documents with these lengths."""
    ids = torch.stack([torch.arange(len(pack)).repeat_interleave(torch.tensor(pack)) for pack in packs])
    return SequenceShard(ids.shape[1], len(packs), ids.to(device), group, device)


def with_calls(core: Callable, shard: SequenceShard, runs: Runs, kv: torch.Tensor, layers: Layers) -> dict:
    """The layers' outputs, gradients of their queries [m, b, ...], and that of the K,V, of this rank.

    Args:
        core: called as `core_attention`.
        kv: of the whole sequence [s, b, G, 2, D].
    """
    queries = QueryShard(shard, runs)
    mine = (positions_of(runs)[None] == positions_of(queries.runs)[:, None]).nonzero()[:, 1].to(kv.device)
    own = shard.local(kv.detach(), 0).clone().requires_grad_()
    hidden = torch.zeros(1, 1, 1, dtype=kv.dtype, device=kv.device, requires_grad=True)
    hidden, reader = SharedKVReader.enter(hidden, own, own.dtype, None, DocumentCalls(shard, queries.runs))
    loss, found = hidden.sum(), {}
    for index, (query, gradient) in enumerate(layers):
        leaf = query[mine].detach().requires_grad_()
        out = document_attention(core, reader, leaf)
        loss = loss + (out * gradient[mine]).sum()
        found |= {f"output {index}": out, f"query {index}": leaf}
    loss.backward()
    found["K,V"] = own
    return {name: x.grad if x.is_leaf else x.detach() for name, x in found.items()}


def with_mask(shard: SequenceShard, runs: Runs, kv: torch.Tensor, layers: Layers) -> dict:
    """The same by all keys and a mask, in the dtype of `kv`."""
    queries = QueryShard(shard, runs)
    positions = positions_of(runs, kv.device)
    mine = (positions[None] == positions_of(queries.runs, kv.device)[:, None]).nonzero()[:, 1]
    ids, everything = shard.document_ids, torch.arange(shard.length, device=kv.device)
    visible = (ids[:, positions, None] == ids[:, None]) & (everything <= positions[:, None])
    kv = kv.detach().requires_grad_()
    found = {}
    for index, (query, gradient) in enumerate(layers):
        leaf = query.to(kv.dtype).detach().requires_grad_()
        key, value = (x.repeat_interleave(query.shape[2] // kv.shape[2], 2) for x in kv.unbind(3))
        scores = torch.einsum("mbhd,sbhd->bhms", leaf, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("bhms,sbhd->mbhd", weights, value).flatten(2)
        (out * gradient).sum().backward()
        found |= {f"output {index}": out.detach()[mine], f"query {index}": leaf.grad[mine]}
    return found | {"K,V": shard.local(kv.grad, 0)}
