"""Which tokens influence which, measured by gradients: d(logits at position t) / d(embedding of token j).

A gradient without a path is exactly zero, in whatever order and precision its zeros are added; with a path it is not,
along random directions.
"""

import torch

from yoco_megatron.model.yoco_model import YOCOModel


def influence(inputs: torch.Tensor, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bool [position t, token j]: whether outputs[t] depends on inputs[j]; both [positions, width]."""
    rows = []
    for output in outputs:
        direction = torch.randn(output.shape, generator=generator).to(output)
        (gradient,) = torch.autograd.grad((output * direction).sum(), inputs, retain_graph=True)
        assert gradient.isfinite().all()
        rows.append((gradient != 0).flatten(1).any(1))
    return torch.stack(rows)


def model_influence(
    model: YOCOModel, ids: torch.Tensor, generator: torch.Generator, document_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Which embeddings influence the logits of one sequence, ids [1, tokens]: bool [position t, token j].

    One forward pass per position: Transformer Engine frees what it saved, so a second backward is impossible.
    """
    embedded = []
    hook = model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    rows = []
    for position in range(ids.shape[1]):
        logits = model(ids, document_ids=document_ids)
        rows.append(influence(embedded.pop(), logits[0, position : position + 1], generator))
    hook.remove()
    return torch.cat(rows)
