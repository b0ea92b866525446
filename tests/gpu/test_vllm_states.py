"""The vLLM plugin's retention by the kernels: any schedule against whole sequences, and decoding in a CUDA graph."""

from dataclasses import replace

import pytest
import torch
from support.vllm_steps import LENGTHS, SLOTS, Batch, Scheduler
from yoco_vllm.states import retain

from yoco_megatron.ops.gated_retention.torch import chunkwise

pytestmark = pytest.mark.gpu
H, D, DEVICE = 3, 128, "cuda"


def random_inputs(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(length, H, D, device=DEVICE).to(dtype) for _ in range(3))
    return q, k, v, -torch.rand(length, H, device=DEVICE) / 16


def on(batch: Batch, copy: bool = False) -> Batch:
    names = ("query_start_loc", "seq_lens", "state_indices_tensor")
    return replace(batch, **{name: getattr(batch, name).to(DEVICE, torch.int32, copy=copy) for name in names})


# As in test_retention_kernels.py: operands of bf16 are rounded to 2^-9 twice; float32 takes three tf32 products.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)])
def test_pieces_equal_whole_sequences(dtype, tolerance):
    whole = [random_inputs(length, dtype) for length in LENGTHS]
    states = torch.full((SLOTS, H, D, D), torch.nan, device=DEVICE)
    found = [torch.zeros(length, H, D, device=DEVICE) for length in LENGTHS]
    for pieces, batch in Scheduler(torch.Generator().manual_seed(0)).steps():
        parts = (torch.cat([whole[i][part][piece] for i, piece in pieces]) for part in range(4))
        out = retain(*parts, states, on(batch))
        for (i, piece), rows in zip(pieces, out.split(batch.query_start_loc.diff().tolist())):
            found[i][piece] = rows.float()
    for inputs, o in zip(whole, found):
        wanted, _ = chunkwise(*(x[None].double() for x in inputs))
        assert (o.double() - wanted[0]).norm() < tolerance * wanted.norm()


def test_decoding_in_a_cuda_graph():
    """Replayed for other sequences, with padding, it is what runs eagerly: nothing of a batch is read on the host."""
    first = on(Batch(4, 0, torch.arange(5), torch.tensor([5, 1, 8, 3]), torch.tensor([8, 2, 4, 1])))
    other = on(Batch(4, 0, torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 9, 4, 0]), torch.tensor([3, 8, 5, -1])))
    inputs, states = random_inputs(4, torch.bfloat16), torch.randn(SLOTS, H, D, D, device=DEVICE)
    retain(*inputs, states.clone(), first)  # compiles
    static, static_states = on(first, copy=True), states.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = retain(*inputs, static_states, static)
    for batch in (first, other):
        static_states.copy_(states)
        for name in ("query_start_loc", "seq_lens", "state_indices_tensor"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        wanted_states = states.clone()
        wanted = retain(*inputs, wanted_states, batch)
        assert torch.equal(out[:3], wanted[:3]) and torch.equal(static_states[1:], wanted_states[1:])
