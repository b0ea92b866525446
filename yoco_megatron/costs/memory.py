"""Memory of training on the fullest GPU.

Sizes of the states are exact; activations are the estimate of Korthikanti et al. (arXiv 2205.05198, section 4) for a
Transformer layer, which a YOCO layer is close to. So states that do not fit are an error, an estimate only a warning.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.costs.stage_time import Parts, stage_parameters

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    states: int
    """Weights, gradients, optimizer."""
    activations: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.states + self.activations


def gpu_memory(args: Namespace, stages: Sequence[Parts] | None = None) -> Memory:
    """Memory of the fullest GPU for parsed arguments whose vocabulary is known; `stages`: what each pipeline stage
    holds, in the order that a micro-batch visits them."""
    shape = ModelShape.from_args(args)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    data_parallel = max(1, args.world_size // (tp * pp * args.context_parallel_size))
    if stages is not None and pp > 1:
        per_stage = [stage_parameters(parts, shape) for parts in stages]
        held = max(sum(per_stage[rank::pp]) for rank in range(pp))
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
        per_layer = value * tokens * shape.hidden_size / split + _stored_attention(args, shape, tokens) / tp
    else:
        per_layer = 17 * value * tokens * shape.hidden_size / split - _recomputed(args, shape, tokens) / tp
    in_flight = pp if pp > 1 else 1
    return Memory(int(states), int(per_layer * layers * in_flight + _loss(args, shape, tokens)))


def cache_bytes(shape: ModelShape, bytes_per_value: int) -> tuple[int, int]:
    """Of one sequence in generation: (a token, for the one shared K,V; whatever the length, for the self-decoder)."""
    return shape.kv_width * bytes_per_value, shape.num_self_decoder_layers * shape.mixer.cache_bytes(
        shape, bytes_per_value
    )


def _bytes_of_a_value(args: Namespace) -> int:
    """In the dtype of training."""
    return 2 if args.bf16 or args.fp16 else 4


def _recomputed(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes a layer, the mean of all, that --recompute-elementwise does not store: SwiGLU's output, and what the
    mixer's record says (model/layers/recompute.py)."""
    if args.architecture != "yoco" or not args.recompute_elementwise:
        return 0.0
    mixer = shape.mixer.recomputed_values(shape) * shape.num_self_decoder_layers / shape.num_layers
    return _bytes_of_a_value(args) * tokens * (shape.ffn_hidden_size + mixer)


def _stored_attention(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes a layer, the mean of all, that --keep-cross-attention stores: outputs of cross attention and, for each
    query, the fp32 logarithm of its softmax's sum; for documents of several samples the queries as the kernel
    reads them, too (model/layers/recompute.py)."""
    if args.architecture != "yoco" or not args.keep_cross_attention:
        return 0.0
    share = 1 - shape.num_self_decoder_layers / shape.num_layers
    value = _bytes_of_a_value(args)
    copies = args.dataloader_inter_document_masking and args.micro_batch_size > 1
    heads = shape.num_attention_heads * (1 + copies)
    return share * tokens * (heads * value * shape.kv_channels + 4 * shape.num_attention_heads)


def _loss(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Bytes of the loss of `tokens` tokens: logits and their gradient in fp32.

    With --loss-chunk-size the logits of a chunk alone, which their gradient replaces, in the dtype of training; and the
    output layer's gradient in fp32 where it is not added to Megatron's buffer (ops/linear_cross_entropy/torch.py).
    """
    if not shape.padded_vocab_size:
        return 0
    vocab_rows = shape.vocab_rows / args.tensor_model_parallel_size
    if not args.loss_chunk_size:
        return 2 * 4 * tokens * vocab_rows
    logits = _bytes_of_a_value(args) * min(args.loss_chunk_size, tokens) * vocab_rows
    return logits + (0 if args.gradient_accumulation_fusion else 4 * vocab_rows * shape.hidden_size)
