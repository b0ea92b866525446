"""One call of Megatron's schedule on a small YOCO, at any mesh and cuts, for comparison with one process."""

from argparse import Namespace
from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import training

from support.models import SEQ, VOCAB, batch, build, document_batch, gather_whole, tiny_config
from yoco_megatron import upstream
from yoco_megatron.model.init import named_parameters
from yoco_megatron.parallel.pipeline.stages import StagePlan

MICRO_BATCH = 2


def of_this_rank(*whole: torch.Tensor) -> list[torch.Tensor]:
    """The tokens of this context-parallel rank, as Megatron's data path hands them out."""
    batch = dict(enumerate(whole))
    return list(get_batch_on_this_cp_rank(batch, False, mpu.get_context_parallel_group()).values())


def forward_step(data: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], model: torch.nn.Module):
    """The mean cross entropy; in float64 a random linear function of the logits, as Megatron's entropy is fp32."""
    tokens, labels, document_ids = next(data)
    exact = get_attr_wrapped_model(model, "config").params_dtype == torch.float64
    weights = torch.randn(*labels.shape, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tokens, labels, weights = of_this_rank(tokens, labels, weights)
    output = model(tokens, None, None, labels=None if exact else labels, document_ids=document_ids)

    def loss_func(losses: torch.Tensor):
        if exact:
            tp = mpu.get_tensor_model_parallel_group()
            losses = (losses * weights.chunk(tp.size(), -1)[tp.rank()].to(losses.device)).sum(-1)
        total, mean = losses.sum(), losses.detach().mean()
        if exact:
            torch.distributed.all_reduce(mean, group=tp)
        torch.distributed.all_reduce(mean, torch.distributed.ReduceOp.AVG, mpu.get_context_parallel_group())
        return total, torch.tensor(losses.numel(), device=total.device), {"loss": mean}

    return output, loss_func


def pipeline_step(
    overrides: dict,
    layout: str | None,
    tied: bool = False,
    num_microbatches: int = 4,
    forward_only: bool = False,
    documents: bool = False,
) -> dict[str, torch.Tensor]:
    """Run the schedule once, on packed documents or not.

    Returns:
        'loss' [micro-batches] on the last pipeline rank, and 'grad/NAME', whole, of the parameters held here.
    """
    ranks, rank = mpu.get_pipeline_model_parallel_world_size(), mpu.get_pipeline_model_parallel_rank()
    model_chunks = (layout.count("|") + 1) // ranks if layout else 1
    config = tiny_config(
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=ranks,
        context_parallel_size=mpu.get_context_parallel_world_size(),
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
    ids = document_batch(len(tokens)).split(MICRO_BATCH) if documents else [None] * num_microbatches
    data = list(zip(tokens.split(MICRO_BATCH), labels.split(MICRO_BATCH), ids))
    upstream.install(Namespace(run_folder=None), only={"get_forward_backward_func"})
    outputs = training.get_forward_backward_func()(
        forward_step_func=forward_step,
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
    return result
