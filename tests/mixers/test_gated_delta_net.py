"""The record says what gated DeltaNet stores for backward, with an op that keeps what fla's does."""

import torch
from support.models import BF16, build, tiny_config
from torch import Tensor

from yoco_megatron.mixers import GATED_DELTA_NET
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

TOKENS, KEPT = 128, 64  # values a head of the chunks' inverse


class LikeFla(torch.autograd.Function):
    """Keeps its inputs, contiguous, and KEPT values a head and token."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta):
        ctx.save_for_backward(
            *(x.contiguous() for x in (q, k, v)), log_decay.clone(), beta, q.new_zeros(*v.shape[:3], KEPT)
        )
        return v.clone()

    @staticmethod
    def backward(ctx, do):
        return None, None, None, None, None


def test_stored_bytes(one_process) -> None:
    config = tiny_config(self_decoder="gated_delta_net", **BF16)
    layer = build(config).bfloat16().decoder.layers[0].self_attention
    layer.op = lambda *inputs, **_: (LikeFla.apply(*inputs), None)
    x = torch.randn(TOKENS, 1, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    others = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, packed_seq_params=SequenceShard(TOKENS, 1))
    counted = sum(size for place, size in stored.items() if place not in others)
    expected = TOKENS * GATED_DELTA_NET.stored_bytes(config, 2)
    assert abs(counted - expected) < 0.01 * expected  # and a norm's weight or two
