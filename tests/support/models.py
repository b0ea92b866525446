"""Small YOCO models, and one training step of them at any mesh, for comparison with one process."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from yoco_megatron import runtime
from yoco_megatron.gradient_check.whole import gather_whole, reduced_gradient, with_all_experts
from yoco_megatron.mixers import GATED_RETENTION, SLIDING_WINDOW
from yoco_megatron.model.init import initialize, named_parameters
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.pipeline.stages import Stage
from yoco_megatron.training.batch import labels_later

VOCAB, SEQ = 256, 48
SELF_DECODERS = (GATED_RETENTION.name, SLIDING_WINDOW.name)
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
STORED_ATTENTION = FULL_RECOMPUTE | dict(keep_cross_attention=True)
# Balanced by a loss of each sequence, which no batch that is divided over ranks changes.
EXPERTS = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=16,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=0.1,
    moe_z_loss_coeff=0.1,
    moe_router_dtype="fp32",
    moe_token_dispatcher_type="alltoall",
)
BF16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
TE = dict(transformer_impl="transformer_engine", apply_rope_fusion=True)
# Heads of width 64, which every kernel takes.
WIDE_HEADS = dict(hidden_size=256, num_attention_heads=4, num_query_groups=2, self_decoder_heads=4)
# Norms that Transformer Engine fuses into the next linear layer, and their names where they are separate.
FUSED_NORMS = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_gate.layer_norm_weight": "input_layernorm.weight",
    ".linear_kv.layer_norm_weight": ".layernorm.weight",
}


def plain_name(name: str) -> str:
    """The name of a parameter in a model whose norms are separate."""
    for fused, apart in FUSED_NORMS.items():
        name = name.replace(fused, apart)
    return name


def tiny_config(**overrides: Any) -> YOCOConfig:
    """A YOCO of four layers, width 64, with every shape different enough to catch a mix-up."""
    fields = dict(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        self_decoder_heads=4,
        self_decoder_window=7,
        retention_chunk_size=16,
        mamba_num_heads=8,
        mamba_head_dim=8,
        mamba_state_dim=12,
        mamba_num_groups=4,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        transformer_impl="local",
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    return YOCOConfig(**fields | overrides)


def build(
    config: YOCOConfig,
    tied: bool = False,
    seed: int = 1234,
    stage: Stage | None = None,
    vp_stage: int | None = None,
    model_class: type[YOCOModel] = YOCOModel,
) -> YOCOModel:
    """The part of the model that this rank holds, initialised, on its device."""
    # Megatron says with these which attention a model has, and refuses another one in the same process.
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_class(
        config,
        VOCAB,
        SEQ,
        stage=stage,
        share_embeddings_and_output_weights=tied,
        parallel_output=True,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    initialize(model, config, seed, config.init_law, groups)
    return model.to(runtime.device())


def batch(size: int = 4, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), int64 [size, SEQ], the same on every rank."""
    tokens = torch.randint(0, VOCAB, (size, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(runtime.device())
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def later_labels(
    config: YOCOConfig, labels: torch.Tensor, ids: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """What a model with multi-token prediction takes besides `labels`, [layers, size, SEQ]."""
    loss_mask = torch.ones(labels.shape) if loss_mask is None else loss_mask
    depths = range(1, 1 + (config.mtp_num_layers or 0))
    later = [labels_later(labels, loss_mask.to(labels.device), ids, depth) for depth in depths]
    return torch.stack(later) if later else None


# Where documents start. The chunks of context parallelism begin at multiples of 12 and of 6: on these edges, just
# before and after them; in one sample nowhere, so that windows and states cross every edge.
DOCUMENT_STARTS = ([12, 36], [11, 13, 30], [], [23, 24, 25], [1, 41, 47], [18], [5, 6, 7], [35, 37])


def document_batch(size: int = 4) -> torch.Tensor:
    """Documents of `batch`, int32 [size, SEQ]."""
    starts = torch.zeros(size, SEQ, dtype=torch.int32)
    for sample, row in enumerate(starts):
        row[DOCUMENT_STARTS[sample % len(DOCUMENT_STARTS)]] = 1
    return starts.cumsum(1).int().to(runtime.device())


def train_step(
    overrides: dict, tied: bool = False, distributed_optimizer: bool = False, documents: bool = False
) -> dict[str, torch.Tensor]:
    """One step on a fixed batch, of packed documents or not, split over data-parallel ranks.

    Returns:
        'loss' (mean over the whole batch), 'grad/NAME' and, after one Adam step, 'weight/NAME', by global name, whole.
    """
    config = tiny_config(
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        expert_model_parallel_size=mpu.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=mpu.get_expert_tensor_parallel_world_size(),
        **overrides,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = build(config, tied)
    names = dict(named_parameters(model))
    if config.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False, grad_reduce_in_fp32=True
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
            clip_grad=0.0,
        ),
        [ddp],
    )
    tokens, labels = batch()
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    mine = slice(rank * len(tokens) // size, (rank + 1) * len(tokens) // size)
    ddp.train()
    document_ids = document_batch(len(tokens))[mine] if documents else None
    later = later_labels(config, labels[mine], document_ids)
    loss = ddp(tokens[mine], None, None, labels=labels[mine], document_ids=document_ids, later_labels=later).mean()
    loss.backward()
    finalize_model_grads([ddp])
    result = {"loss": loss.detach()}
    torch.distributed.all_reduce(result["loss"], op=torch.distributed.ReduceOp.AVG, group=mpu.get_data_parallel_group())
    for name, param in names.items():
        result[f"grad/{name}"] = gather_whole(name, reduced_gradient(param, ddp), param).cpu()
    optimizer.step()
    for name, param in names.items():
        result[f"weight/{name}"] = gather_whole(name, param.detach(), param).cpu()
    # What balances experts without a loss; its entries are multiples of the update rate, and so equal or far apart.
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    result |= {f"weight/{name}": buffer.cpu().clone() for name, buffer in biases.items()}
    return with_all_experts(result)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference|| in float64."""
    value, reference = value.double().cpu(), reference.double().cpu()
    return (torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference)).item()


def assert_close(result: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], loss: float, grad: float) -> None:
    """The loss and all gradients, by their relative errors."""
    assert result.keys() == reference.keys()
    errors = {name: relative_error(value, reference[name]) for name, value in result.items()}
    of_loss = errors.pop("loss")
    worst = max(errors, key=errors.get)
    print(f"loss {of_loss:.1e}, worst gradient {worst} {errors[worst]:.1e}")
    assert of_loss < loss
    assert errors[worst] < grad, worst
