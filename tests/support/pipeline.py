"""One call of Megatron's pipeline schedule on a small YOCO, at any cuts, for comparison with one process."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module

from support.models import SEQ, batch, build, document_batch, gather_whole, tiny_config
from yoco_megatron.model.init import named_parameters
from yoco_megatron.parallel.stages import StagePlan
from yoco_megatron.training.upstream import get_forward_backward_func

MICRO_BATCH = 2


def forward_step(data: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], model: torch.nn.Module):
    tokens, labels, document_ids = next(data)
    output = model(tokens, None, None, labels=labels, document_ids=document_ids)

    def loss_func(losses: torch.Tensor):
        loss = losses.mean()
        return loss, {"loss": loss.detach().clone()}

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
    chunks = (layout.count("|") + 1) // ranks if layout else 1
    config = tiny_config(
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_model_parallel_layout=layout,
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        **{"num_layers": 8, **overrides},
    )
    config.finalize_model_grads_func = finalize_model_grads
    plan = StagePlan.from_config(config)
    models, names = [], []
    for chunk in range(chunks):
        stage = plan.stage(chunk * ranks + rank)
        model = build(config, tied, stage=stage, vp_stage=chunk if chunks > 1 else None)
        names.append(dict(named_parameters(model)))
        wrapped = Float16Module(config, model) if config.bf16 else model
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), wrapped)
        models.append(wrapped.eval() if forward_only else wrapped.train())
    tokens, labels = batch(MICRO_BATCH * num_microbatches)
    ids = document_batch(len(tokens)).split(MICRO_BATCH) if documents else [None] * num_microbatches
    data = list(zip(tokens.split(MICRO_BATCH), labels.split(MICRO_BATCH), ids))
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(data) for _ in models] if chunks > 1 else iter(data),
        model=models if chunks > 1 else models[0],
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
