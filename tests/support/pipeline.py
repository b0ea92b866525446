"""One call of Megatron's schedule on a small YOCO, at any mesh and cuts, for comparison with one process."""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import training

from support.models import (
    SEQ,
    VOCAB,
    batch,
    build,
    document_batch,
    later_labels,
    tiny_config,
)
from yoco_megatron import upstream
from yoco_megatron.gradient_check.whole import gather_whole, with_all_experts
from yoco_megatron.model.init import named_parameters
from yoco_megatron.parallel.context.query_shard import (
    Runs,
    dealt_runs,
    positions_of,
    queries_multiple,
)
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.training.micro_batches import MaskedMicroBatches, MicroBatches
from yoco_megatron.training.query_positions import PositionCounts

MICRO_BATCH = 2


def of_this_rank(*whole: torch.Tensor) -> list[torch.Tensor]:
    """The tokens of this context-parallel rank, as Megatron's data path hands them out."""
    batch = dict(enumerate(whole))
    return list(get_batch_on_this_cp_rank(batch, False, mpu.get_context_parallel_group()).values())


@dataclass
class MicroBatch:
    """Of whole sequences; `loss_mask` [b, s] None: a loss everywhere."""

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None


def forward_step(data: MicroBatches, model: torch.nn.Module):
    """The sum of cross entropies; in float64 a random linear function of the logits, as Megatron's entropy is fp32."""
    given, runs = next(data)
    config = get_attr_wrapped_model(model, "config")
    exact = config.params_dtype == torch.float64
    later = later_labels(config, given.labels, given.document_ids, given.loss_mask)
    shape = *given.labels.shape, VOCAB
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mask = torch.ones(shape[:2]) if given.loss_mask is None else given.loss_mask
    labels, weights, mask = of_these_queries(runs, given.labels, weights, mask.to(given.labels.device))
    output = model(
        *of_this_rank(given.tokens),
        labels=None if exact else labels,
        document_ids=given.document_ids,
        query_runs=runs,
        later_labels=None if later is None else torch.stack(of_these_queries(runs, *later)),
    )

    def loss_func(losses: torch.Tensor):
        if exact:
            tp = mpu.get_tensor_model_parallel_group()
            losses = (losses * weights.chunk(tp.size(), -1)[tp.rank()].to(losses.device)).sum(-1)
        total = (losses * mask).sum()
        report = total.detach() / given.labels.numel()
        if exact:
            torch.distributed.all_reduce(report, group=tp)
        torch.distributed.all_reduce(report, group=mpu.get_context_parallel_group())
        return total, torch.tensor(given.labels.numel() // mpu.get_context_parallel_world_size()), {"loss": report}

    return output, loss_func


def runs_with_loss(loss_mask: torch.Tensor, multiple: int) -> Runs:
    """Runs of the positions at which any sequence has a loss, grown backwards until their total is a multiple; without
    any loss that of the last positions, because a step needs a graph."""
    needed = (loss_mask != 0).any(0).tolist()
    needed[-1] |= not any(needed)
    while sum(needed) % multiple:
        needed[max(at for at in range(len(needed)) if not needed[at])] = True
    edges = [at for at in range(len(needed) + 1) if [False, *needed][at] != [*needed, False][at]]
    return tuple(zip(edges[::2], edges[1::2]))


def of_these_queries(runs: Runs | None, *whole: torch.Tensor) -> list[torch.Tensor]:
    """The positions of the queries that this context-parallel rank computes; its tokens' if there are no runs."""
    if runs is None:
        return of_this_rank(*whole)
    dealt = dealt_runs(runs, mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank())
    return [x.index_select(1, positions_of(dealt).to(x.device)) for x in whole]


def pipeline_step(
    overrides: dict,
    layout: str | None,
    tied: bool = False,
    num_microbatches: int = 4,
    forward_only: bool = False,
    documents: bool = False,
    loss_mask: torch.Tensor | None = None,
    only_queries: bool = False,
) -> dict[str, torch.Tensor]:
    """Run the schedule once, on packed documents or not.

    Args:
        loss_mask: [sequences, SEQ]; None for a loss everywhere. only_queries: compute nothing else.
    Returns:
        'loss' [micro-batches] on the last pipeline rank, and 'grad/NAME', whole, of the parameters held here.
    """
    ranks, rank = mpu.get_pipeline_model_parallel_world_size(), mpu.get_pipeline_model_parallel_rank()
    model_chunks = (layout.count("|") + 1) // ranks if layout else 1
    config = tiny_config(
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=ranks,
        context_parallel_size=mpu.get_context_parallel_world_size(),
        expert_model_parallel_size=mpu.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=mpu.get_expert_tensor_parallel_world_size(),
        virtual_pipeline_model_parallel_size=model_chunks if model_chunks > 1 else None,
        pipeline_model_parallel_layout=layout,
        overlap_p2p_comm=model_chunks > 1,
        batch_p2p_comm=model_chunks == 1,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        **{"num_layers": 8, **overrides},
    )
    config.finalize_model_grads_func = finalize_model_grads
    plan = StagePlan.from_config(config)
    models, names = [], []
    for chunk in range(model_chunks):
        stage = plan.stage(chunk * ranks + rank)
        model = build(config, tied, stage=stage, vp_stage=chunk if model_chunks > 1 else None)
        names.append(dict(named_parameters(model)))
        wrapped = Float16Module(config, model) if config.bf16 else model
        in_fp32 = config.params_dtype != torch.float64
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32), wrapped)
        models.append(wrapped.eval() if forward_only else wrapped.train())
    tokens, labels = batch(MICRO_BATCH * num_microbatches)
    nothing = [None] * num_microbatches
    ids = document_batch(len(tokens)).split(MICRO_BATCH) if documents else nothing
    masks = nothing if loss_mask is None else loss_mask.split(MICRO_BATCH)
    data = [MicroBatch(*parts) for parts in zip(tokens.split(MICRO_BATCH), labels.split(MICRO_BATCH), ids, masks)]
    upstream.install(Namespace(run_folder=None), only={"get_forward_backward_func"})
    step = partial(forward_step)

    def find(given: MicroBatch) -> tuple[Runs, PositionCounts]:
        return runs_with_loss(given.loss_mask, queries_multiple(config)), PositionCounts()

    step.micro_batches = lambda data, _: MaskedMicroBatches(data, find) if only_queries else MicroBatches(data)
    outputs = training.get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(data) for _ in models] if model_chunks > 1 else iter(data),
        model=models if model_chunks > 1 else models[0],
        num_microbatches=num_microbatches,
        seq_length=SEQ,
        micro_batch_size=MICRO_BATCH,
        decoder_seq_length=SEQ,
        forward_only=forward_only,
    )
    result = {"loss": torch.stack([output["loss"] for output in outputs]).cpu()} if outputs else {}
    if not forward_only:
        for held in names:
            for name, param in held.items():
                result[f"grad/{name}"] = gather_whole(name, param.main_grad, param).cpu()
    return with_all_experts(result)
