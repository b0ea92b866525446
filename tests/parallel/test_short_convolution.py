"""A short convolution cut by channels and by context equals one process: output, and gradients of input and weights."""

import pytest
import torch
from megatron.core import parallel_state as mpu
from support.models import SEQ, document_batch, relative_error, tiny_config
from support.worlds import run_world

from yoco_megatron.model.layers.short_convolution import ShortConvolution
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

CHANNELS, BATCH = 8, 4
TOLERANCE = 1e-12  # float64, sums in another order


def step(documents: bool) -> dict[str, torch.Tensor]:
    """This rank's rows and channels, with where they lie."""
    rng = torch.Generator().manual_seed(3)
    whole = {
        name: torch.randn(*shape, generator=rng, dtype=torch.float64)
        for name, shape in dict(x=(SEQ, BATCH, CHANNELS), weight=(CHANNELS, 1, 4), bias=(CHANNELS,)).items()
    }
    tp, cp = mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group()
    ids = document_batch(BATCH) if documents else None
    shard = SequenceShard(SEQ, BATCH, ids, cp if cp.size() > 1 else None)
    layer = ShortConvolution(tiny_config(params_dtype=torch.float64), CHANNELS, tp, bias=True)
    with torch.no_grad():
        for name, param in layer.named_parameters():
            param.copy_(whole[name].chunk(tp.size())[tp.rank()])
    x = shard.local(whole["x"], 0).chunk(tp.size(), -1)[tp.rank()].clone().requires_grad_()
    y = layer(x, shard)
    y.backward(gradient=shard.local(whole["x"].flip(0), 0).chunk(tp.size(), -1)[tp.rank()])
    of_sequence = {"y": y.detach(), "dx": x.grad}
    found = {name: gathered(shard, tensor, tp, cp) for name, tensor in of_sequence.items()}
    for name, param in layer.named_parameters():
        torch.distributed.all_reduce(param.grad, group=cp)
        found[f"d{name}"] = joined(param.grad, tp, 0)
    return found


def joined(x: torch.Tensor, group, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def gathered(shard: SequenceShard, x: torch.Tensor, tp, cp) -> torch.Tensor:
    rows = joined(joined(x, tp, -1), cp, 0)
    return shard.to_sequence_order(rows) if shard.ranks > 1 else rows


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_equals_one_process(documents: bool) -> None:
    """Chunks of 6 tokens at CP4: documents of one and of several chunks end on their edges and beside them."""
    reference = run_world(1, step, documents)[0]
    for tp, cp in ((1, 4), (2, 2)):
        for result in run_world(tp * cp, step, documents, tp=tp, cp=cp):
            for name, value in result.items():
                assert relative_error(value, reference[name]) < TOLERANCE, (name, tp, cp)
