"""What a job on a cluster needs, found out on the login node: a mesh that fits the nodes, memory, environment.

Sizes of the states are exact; activations are the estimate of Korthikanti et al. (arXiv 2205.05198, section 4) for a
Transformer layer, which a YOCO layer is close to. So states that do not fit are an error, an estimate only a warning.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from yoco_megatron.config.rules import require
from yoco_megatron.config.shape import ModelShape, parameter_count
from yoco_megatron.parallel.planner import stage_parameters
from yoco_megatron.parallel.stages import StagePlan

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    states: int
    """Weights, gradients, optimizer."""
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.activations


@contextlib.contextmanager
def world_of(processes: int) -> Iterator[None]:
    """Inside, Megatron's arguments are parsed as the first of so many processes would."""
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def memory(args: Namespace, plan: StagePlan | None = None) -> Memory:
    """Memory of the fullest GPU for parsed arguments whose vocabulary is known; `plan` where there are stages."""
    shape = ModelShape.from_args(args)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    data_parallel = max(1, args.world_size // (tp * pp * args.context_parallel_size))
    if plan is not None and pp > 1:
        chunks = plan.count // pp
        of_stage = [stage_parameters(plan.stage(g), plan.border, shape) for g in range(plan.count)]
        held = max(sum(of_stage[rank::pp][:chunks]) for rank in range(pp))
    else:
        held = sum(parameter_count(shape).values()) / pp
    value = _bytes_of_a_value(args)
    # bf16: weight 2, gradient 4, and fp32 weight 4, two moments 8 in the optimizer; fp32 needs no second weight.
    weights, optimizer = (2 + 4, 12) if value == 2 else (4 + 4, 8)
    sharded = data_parallel if args.use_distributed_optimizer else 1
    states = held / tp * (weights + optimizer / sharded)
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    layers = shape.num_layers / pp
    split = tp if args.sequence_parallel or tp == 1 else 1
    if args.recompute_granularity == "full":
        per_layer = value * tokens * shape.hidden_size / split + _kept(args, shape, tokens) / tp
    else:
        per_layer = 17 * value * tokens * shape.hidden_size / split - _remade(args, shape, tokens) / tp
    in_flight = pp if pp > 1 else 1
    return Memory(int(states), int(per_layer * layers * in_flight + _loss(args, shape, tokens)))


def _bytes_of_a_value(args: Namespace) -> int:
    """In the dtype of training."""
    return 2 if args.bf16 or args.fp16 else 4


def _remade(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes a layer, the mean of all, that --recompute-elementwise does not keep: SwiGLU's output, and in retention
    layers the gated one (model/remade.py)."""
    if args.architecture != "yoco" or not args.recompute_elementwise:
        return 0.0
    share = shape.num_self_decoder_layers / shape.num_layers if shape.self_decoder == "gated_retention" else 0.0
    return _bytes_of_a_value(args) * tokens * (shape.ffn_hidden_size + share * shape.hidden_size)


def _kept(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes a layer, the mean of all, that --keep-cross-attention keeps: outputs of the cross-decoder layers' attention
    and, for each query, the fp32 logarithm of its softmax's sum; for documents of several samples what the kernel
    reads, too (model/kept_attention.py)."""
    if args.architecture != "yoco" or not args.keep_cross_attention:
        return 0.0
    share = 1 - shape.num_self_decoder_layers / shape.num_layers
    value = _bytes_of_a_value(args)
    copies = args.dataloader_inter_document_masking and args.micro_batch_size > 1
    heads = shape.num_attention_heads + copies * (shape.num_attention_heads + 2 * shape.num_query_groups)
    return share * tokens * (heads * value * shape.kv_channels + 4 * shape.num_attention_heads)


def _loss(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes of the loss of `tokens` tokens: logits and their gradient in fp32.

    With --loss-chunk-size the logits of a chunk alone, which their gradient replaces, in the dtype of training; and the
    output layer's gradient in fp32 where it is not added to Megatron's buffer (ops/linear_cross_entropy/torch.py).
    """
    if not shape.padded_vocab_size:
        return 0
    words = shape.vocab_rows / args.tensor_model_parallel_size
    if not args.loss_chunk_size:
        return 2 * 4 * tokens * words
    logits = _bytes_of_a_value(args) * min(args.loss_chunk_size, tokens) * words
    return logits + (0 if args.gradient_accumulation_fusion else 4 * words * shape.hidden_size)


def environment(gpu: str, args: Namespace, run_folder: str) -> dict[str, str]:
    """Variables that the GPU generation and the parallel mode ask for. `gpu`: ampere, hopper, blackwell or none."""
    require(gpu in ("ampere", "hopper", "blackwell", "none"), f"gpu '{gpu}': must be ampere, hopper, blackwell or none")
    common = {"OMP_NUM_THREADS": "1"}
    if gpu == "none":
        return common | {"CUDA_VISIBLE_DEVICES": ""}
    sharded = getattr(args, "use_megatron_fsdp", False) or getattr(args, "use_torch_fsdp2", False)
    ordered = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    # One queue, where tensor-parallel collectives must start before the matmul that hides them; with FSDP the gathers
    # would wait for compute in it, and Blackwell keeps the order by itself.
    connections = "32" if sharded or gpu == "blackwell" else "1" if ordered else "8"
    return common | {
        "CUDA_DEVICE_MAX_CONNECTIONS": connections,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "NCCL_NVLS_ENABLE": "0",  # it takes GPU memory; a site that wants it sets it in its config
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the flight recorder: which collective hung
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{run_folder}/stacks/nccl_",
    }
