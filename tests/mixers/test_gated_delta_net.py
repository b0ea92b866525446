"""The record says what gated DeltaNet stores for backward, with an op that keeps what fla's kernels keep."""

import pytest
import torch
from support.models import BF16, build, tiny_config
from torch import Tensor

from yoco_megatron.mixers import GATED_DELTA_NET
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

TOKENS = 128


def test_stored_bytes(one_process) -> None:
    config = tiny_config(self_decoder="gated_delta_net", **BF16)
    layer = build(config).bfloat16().decoder.layers[0].self_attention
    layer.op = pytest.importorskip("yoco_megatron.dry_run.gpu", reason="needs Triton").gated_delta
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
