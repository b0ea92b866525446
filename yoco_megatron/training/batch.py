"""One micro-batch: broadcast from tensor-parallel rank 0, which read it, and cut to the tokens of this CP rank."""

from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

from yoco_megatron.parallel.context.query_shard import Runs, dealt_runs, positions_of


def needs_data(args: Namespace, vp_stage: int | None) -> bool:
    """Whether a stage takes anything of a micro-batch: the first and last do, and all if documents are kept apart."""
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    return first or last or args.dataloader_inter_document_masking


def get_batch(
    sample: dict[str, Tensor] | None, runs: Runs | None, micro_batch_size: int, vp_stage: int | None = None
) -> dict[str, Tensor | None]:
    """tokens, labels, position_ids int64 [b, s] and loss_mask fp32 [b, s] (None if this stage does not need them).

    b is `micro_batch_size`, which may be another one in evaluation; s is the number of tokens of this context-parallel
    rank; labels and loss_mask are those of its m queries, where only `runs` are computed behind the shared K,V. With
    --dataloader-inter-document-masking also document_ids int32 [b, whole sequence], which every stage and rank needs
    (else None), on the host or on the device. With --mtp-num-layers, where there are labels, also later_labels int64
    [layers, b, s or m] (else None).

    Args:
        sample: as the data loader makes it; read on tensor-parallel rank 0 alone.
        runs: positions of a whole sequence (micro_batches.py); None for all.
    """
    args = get_args()
    documents = args.dataloader_inter_document_masking
    if not needs_data(args, vp_stage):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "document_ids", "later_labels"))
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert sample is not None
        device = torch.cuda.current_device()
        # A blend also says which source a sample is of: no row of tokens, which could be cut to those of a rank.
        batch = {key: value.to(device, non_blocking=True) for key, value in sample.items() if key != "dataset_id"}
        batch["cu_seqlens_padded"] = None  # documents are packed without gaps
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,  # attention is causal everywhere; no mask is sent
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    ids = None
    if documents:
        cu_seqlens = batch["cu_seqlens"]
        if sample is not None and mpu.get_tensor_model_parallel_world_size() == 1:
            cu_seqlens = sample["cu_seqlens"]  # on the host, which then need not ask the device for the documents
        ids = document_ids(cu_seqlens, args.seq_length)
    of_labels = ["labels", "loss_mask"]
    depths = args.mtp_num_layers or 0 if batch["labels"] is not None else 0
    for depth in range(1, depths + 1):
        of_labels.append(f"labels {depth} later")
        batch[of_labels[-1]] = labels_later(batch["labels"], batch["loss_mask"], ids, depth)
    of_queries = {} if runs is None else {name: _at_queries(batch.pop(name), runs) for name in of_labels}
    # Zig-zag over whole sequences, regardless of documents.
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group(), use_per_sequence_balancing=True
    )
    batch |= of_queries
    batch["document_ids"] = ids
    later = [batch.pop(name) for name in of_labels[2:]]
    batch["later_labels"] = torch.stack(later) if later else None
    return batch


def labels_later(labels: Tensor, loss_mask: Tensor, ids: Tensor | None, depth: int) -> Tensor:
    """The label of the token `depth` places on, int64 [b, s]; -1 where that is of another document, or where one of the
    `depth` next labels has no loss: the layers before, of which the inputs come, have none there either.

    Args:
        labels: int64 [b, s] of whole sequences; loss_mask: fp32 [b, s]; ids: of documents, [b, s], or None for one.
    """
    has_loss = (loss_mask[:, 1:] != 0).unfold(1, depth, 1).all(-1)
    if ids is not None:
        has_loss &= (ids[:, depth:] == ids[:, :-depth]).to(has_loss.device)
    return F.pad(torch.where(has_loss, labels[:, depth:], -1), (0, depth), value=-1)


def _at_queries(whole: Tensor | None, runs: Runs) -> Tensor | None:
    """[b, whole sequence] -> [b, m] at the queries of this context-parallel rank."""
    if whole is None:
        return None
    dealt = dealt_runs(runs, mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank())
    return whole.index_select(1, positions_of(dealt, whole.device))


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Number of each token's document in its sequence, int32 [b, length].

    Args:
        cu_seqlens: int32 [b, any]: 0, the ends of the documents, then `length` repeated (GPTDataset's padding).
        length: tokens of a sequence.
    """
    positions = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device).expand(len(cu_seqlens), -1)
    return torch.searchsorted(cu_seqlens[:, 1:].contiguous(), positions.contiguous(), right=True, out_int32=True)
