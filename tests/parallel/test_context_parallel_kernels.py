"""Context parallelism of the fused retention mixer: its very kernels, in Triton's interpreter, against torch.

float32, sums in another order: 2e-5.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import INTERPRETED, run_interpreted
from support.models import FULL_RECOMPUTE, relative_error
from support.pipeline import pipeline_step
from support.worlds import run_world

pytest.importorskip("triton")
SMALL = dict(num_layers=2, self_decoder="gated_retention")
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
# name -> (ranks, packed documents, config)
CASES = {
    "one rank": (1, True, {}),
    "CP2 documents": (2, True, {}),
    "CP4 documents recompute": (4, True, FULL_RECOMPUTE),
    "CP2 core recompute": (2, False, SELECTIVE),
}
# (tokens, segments, packed documents)
SPANS = [(64, None, False), (130, 2, False), (300, 3, True), (20, None, True), (256, 4, True)]


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, len(CASES) + len(SPANS))


if INTERPRETED:
    from yoco_megatron.ops.gated_retention import triton as triton_ops
    from yoco_megatron.ops.gated_retention.chunk_state import state_gradient, state_update

    @cache
    def reference(documents: bool) -> dict[str, torch.Tensor]:
        torch_ops = SMALL | dict(retention_backend="torch")
        return run_world(1, pipeline_step, torch_ops, None, False, 1, False, documents)[0]

    @pytest.mark.parametrize("case", CASES)
    def test_equals_one_process_in_torch(case: str) -> None:
        ranks, documents, overrides = CASES[case]
        kernels = SMALL | overrides | dict(retention_backend="triton")
        for result in run_world(ranks, pipeline_step, kernels, None, False, 1, False, documents, cp=ranks):
            for name, value in reference(documents).items():
                error = relative_error(result[name], value)
                assert error < 2e-5, f"{name}: relative error {error:.1e}"

    @pytest.mark.parametrize(("tokens", "segments", "documents"), SPANS)
    def test_states_of_a_span(tokens: int, segments: int | None, documents: bool) -> None:
        """What the kernels make of a whole span, against float64."""
        generator = torch.Generator().manual_seed(tokens)
        shape = (2, tokens, 3, 16)
        q, k, v, do = (torch.randn(shape, generator=generator) for _ in range(4))
        log_decay = -torch.rand(shape[:3], generator=generator) * 0.1
        ids = None
        if documents:  # of the two samples one is a single document
            ids = torch.stack([torch.arange(tokens) // 70, torch.zeros(tokens)]).int()
        launch = triton_ops.plan(q, v, None, ids, None)
        padded = triton_ops.pad_ids(ids, launch)
        sums = triton_ops.decay_sums(log_decay, padded, launch)
        wide = [t.double() for t in (q, k, v, do, log_decay)]
        update, decay = state_update(wide[1], wide[2], masked(wide[4], ids), ids)
        gradient = state_gradient(wide[3], wide[0], masked(wide[4], ids), ids)
        got = triton_ops.span_state(k, v, sums, padded, launch, reverse=False, segments=segments)
        torch.testing.assert_close(got.double(), update, rtol=1e-5, atol=1e-5)
        got = triton_ops.span_state(q, do, sums, padded, launch, reverse=True, segments=segments)
        torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(triton_ops.span_decay(sums, padded, launch).double(), decay, rtol=1e-5, atol=1e-9)

    def masked(log_decay: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """Nothing decays into a document's first token."""
        if ids is None:
            return log_decay
        starts = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
        return log_decay.masked_fill(starts[..., None], 0.0)
