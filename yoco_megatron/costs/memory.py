"""Memory of training, on each rank of a pipeline: what is kept between steps, and the most that a step adds.

Between steps, bytes a parameter: weight 2, gradient 4, and in Adam's state fp32 weight 4 and two moments 8 (bf16; in
fp32 weight 4, gradient 4, moments 8); of other optimizers: `optimizer`. The distributed optimizer divides its part by
data x context parallelism.

In a step each layer stores what its backward pass reads (e bytes a value, h hidden, F FFN width, a token):

    input, two norms' outputs, input of the FFN   4 h e
    FFN: gate, up, their product                  3 F e
    mixer                                         its record's; cross attention 2 H D e + 4 H: queries, outputs, sums
    gated memory unit                             2 W e: its gate, and the product with a memory of W values
    --qk-layernorm                                D e + 4 for each head of queries and keys of softmax attention
    full recompute                                its input h e, and what --keep-cross-attention stores

Behind the shared K,V only the positions that are computed count. Each set of K,V that a stage reads is stored once, of
the whole sequence with context parallelism, and its gradient is an fp32 buffer as long, of one set at a time; the
memory of units likewise, of this rank's tokens alone, and the layer that makes it is not recomputed. The peak is the
largest of all moments at which a backward pass may begin (`in_flight`) with what that pass adds: the loss; the first
layer of the cross-decoder; the first of the self-decoder, when all that the cross-decoder stored is free.
Measured rows beside it: tests/costs/test_measured.py. Not counted: allocator, CUDA, NCCL.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import attrgetter, mul
from typing import Any

from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.config.memory_units import memory_width
from yoco_megatron.costs.optimizer import bytes_of_a_parameter, is_distributed
from yoco_megatron.costs.shape import ModelShape, attention_parameters, layer_matmul_parameters
from yoco_megatron.costs.stage_time import (
    Parts,
    held_parameters,
    kv_sets_arriving,
    kv_sets_read,
    memory_of_stages,
    memory_sources,
    of_rank,
    recomputed_layers,
    shapes_of_ranks,
    stage_parameters,
)
from yoco_megatron.costs.teacher import TeacherMemory, teacher_shape
from yoco_megatron.costs.traffic import travelling

GIB = 1 << 30
EXCHANGED = 4  # with several chunks a rank, on their way: one sent and one received, forward and backward
CUDNN_BYTES = 4  # its backward pass has gradients of queries, keys and values of each head in fp32: by one measured row
BETWEEN_STEPS = ("weights", "teacher", "gradients", "optimizer")


Shared = tuple[range, range, tuple[bool, bool], int | None]
"""Of a stage the sets of K,V that it reads, and those that enter it; and of the memory of units what
`memory_of_stages` and `memory_sources` say."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, {what: bytes}; those of BETWEEN_STEPS, and what the peak of a step adds."""

    parts: Mapping[str, float]

    @property
    def states(self) -> int:
        """Weights, the teacher's too, gradients, optimizer."""
        return int(sum(size for name, size in self.parts.items() if name in BETWEEN_STEPS))

    @property
    def activations(self) -> int:
        """All else."""
        return int(sum(size for name, size in self.parts.items() if name not in BETWEEN_STEPS))

    @property
    def total(self) -> int:
        """Both together."""
        return self.states + self.activations


def gpu_memory(args: Namespace, stages: Sequence[Parts] | None = None) -> Memory:
    """Memory of the fullest GPU for parsed arguments whose vocabulary is known; `stages`: what each pipeline stage
    holds, in the order that a micro-batch visits them."""
    shape = ModelShape.from_args(args)
    return fullest_memory(args, shape, stages or even_stages(args, shape))


def fullest_memory(args: Namespace, shape: ModelShape, stages: Sequence[Parts]) -> Memory:
    """The same of a known shape; of ranks that hold the same the first one has the most in flight."""
    pp, sets = args.pipeline_model_parallel_size, _shared(stages, shape)
    shapes = shapes_of_ranks(stages, shape, pp)
    distinct: dict[Any, int] = {}
    for rank in range(pp):
        held = (tuple(stage.items()) for stage in stages[rank::pp])
        distinct.setdefault((shapes[rank].means_over, *held, *sets[rank::pp]), rank)
    return max((_of_rank(args, shapes, stages, sets, rank) for rank in distinct.values()), key=attrgetter("total"))


def rank_memories(args: Namespace, shape: ModelShape, stages: Sequence[Parts]) -> list[Memory]:
    """Memory of each pipeline rank."""
    pp, sets = args.pipeline_model_parallel_size, _shared(stages, shape)
    shapes = shapes_of_ranks(stages, shape, pp)
    return [_of_rank(args, shapes, stages, sets, rank) for rank in range(pp)]


def _of_rank(
    args: Namespace,
    shapes: Sequence[ModelShape],
    stages: Sequence[Parts],
    sets: Sequence[Shared],
    rank: int,
) -> Memory:
    pp = len(shapes)
    return _memory(args, shapes[rank], stages[rank::pp], sets[rank::pp], in_flight(args, rank, len(stages) // pp))


def _shared(stages: Sequence[Parts], shape: ModelShape) -> list[Shared]:
    of_memory = memory_of_stages(stages, shape), memory_sources(stages, shape)
    return list(zip(kv_sets_read(stages, shape), kv_sets_arriving(stages, shape), *of_memory))


def cache_bytes(shape: ModelShape, bytes_per_value: int) -> tuple[int, int]:
    """Of one sequence in generation: (a token, for the shared K,V; whatever the length, for the self-decoder)."""
    own = shape.num_self_decoder_layers * shape.mean(lambda mixer: mixer.cache_bytes(shape, bytes_per_value))
    return shape.shared_kv_sets * shape.kv_width * bytes_per_value, round(own)


def data_parallel_size(args: Namespace) -> int:
    """Replicas of the model."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return max(1, args.world_size // model)


def num_microbatches(args: Namespace) -> int | None:
    """Of a step on each replica; None if the global batch is not known."""
    if args.global_batch_size is None:
        return None
    return max(1, args.global_batch_size // (data_parallel_size(args) * args.micro_batch_size))


def in_flight(args: Namespace, rank: int, chunks: int) -> list[tuple[list[int], int]]:
    """Moments of a step at which a rank may hold the most: (micro-batches that each of its model chunks has begun and
    not ended, the chunk whose backward pass starts), in their order."""
    pp = args.pipeline_model_parallel_size
    return list(_in_flight(pp, rank, chunks, num_microbatches(args) or pp * chunks))


@cache
def _in_flight(pp: int, rank: int, chunks: int, microbatches: int) -> tuple[tuple[list[int], int], ...]:
    if chunks == 1:
        return (([min(microbatches, pp - rank)], 0),)
    # Interleaved 1F1B takes micro-batches in groups of pp, chunk after chunk, forward from the first, backward from the
    # last. While the first backward passes end, the next forward passes begin: of other chunks, whose layers may store
    # more. Between the ends of groups all numbers are linear, and after one group of every chunk they repeat.
    group, total = pp * chunks, microbatches * chunks
    ahead = min((pp - rank - 1) * 2 + (chunks - 1) * pp + 1, total)

    def passed(count: int, chunk: int) -> int:
        rounds, rest = divmod(count, group)
        return rounds * pp + min(max(rest - chunk * pp, 0), pp)

    ends = {0} | {end for edge in range(0, 2 * group, pp) for end in (edge - 1, edge, edge - ahead - 1, edge - ahead)}
    moments = []
    for count in sorted(end for end in ends if 0 <= end < min(group, total)):
        begun = [passed(min(ahead + count, total), chunk) for chunk in range(chunks)]
        active = chunks - 1 - count // pp
        moments.append(([begun[chunk] - passed(count, chunks - 1 - chunk) for chunk in range(chunks)], active))
    return tuple(moments)


def even_stages(args: Namespace, shape: ModelShape) -> list[Parts]:
    """As many layers in each stage, as Megatron cuts a Transformer; those of multi-token prediction are in the last."""
    count = args.pipeline_model_parallel_size * (args.num_virtual_stages_per_pipeline_rank or 1)
    before, behind = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
    places = shape.num_layers + before + behind  # the embedding and the loss may count as a layer each
    cuts = [min(max(places * stage // count - before, 0), shape.num_layers) for stage in range(count + 1)]
    sources = [max(1, source) for source in sources_of(shape)]  # K,V are made where the last layer before is
    stages: list[Parts] = []
    for first, stop in pairwise(cuts):
        self_layers = max(0, min(stop, shape.num_self_decoder_layers) - first)
        if shape.architecture == "transformer":
            held = {"decoder": stop - first}
        else:
            held = {"self_decoder": self_layers, "cross_decoder": stop - first - self_layers}
            held["shared_kv"] = sum(first < source <= stop for source in sources)
        stages.append(held | {"embedding": int(first == 0), "output_layer": int(stop == shape.num_layers)})
    if shape.mtp_num_layers:
        stages[-1] = {**stages[-1], "mtp": 1}
    return stages


def _memory(
    args: Namespace,
    shape: ModelShape,
    chunks: Sequence[Parts],
    sets: Sequence[Shared],
    moments: Sequence[tuple[Sequence[int], int]],
) -> Memory:
    """Of a rank that holds `chunks`, with what is `_shared` of each, at the fullest of the `in_flight` moments."""
    tp, cp, e = args.tensor_model_parallel_size, args.context_parallel_size, _bytes_of_a_value(args)
    tokens = args.seq_length * args.micro_batch_size / cp
    rows = tokens * shape.query_share  # behind the shared K,V
    split = tp if args.sequence_parallel or tp == 1 else 1
    positions = {"self_decoder": tokens, "cross_decoder": rows, "decoder": tokens}
    kinds = [kind for kind in positions if any(chunk.get(kind) for chunk in chunks)]
    plain = {kind: positions[kind] * _stored_whole(args, shape, kind, split) for kind in kinds}
    again = {kind: positions[kind] * _stored_for_recompute(args, shape, kind, split) for kind in kinds}
    read_kv = _kv_values(args, shape, tokens)
    normed_k = shape.sets_of_source * _normed(shape, e, shape.num_query_groups, shape.kv_channels)
    memory = memory_width(shape) / tp
    arrived_kv = tokens * shape.kv_width / tp if args.pipeline_model_parallel_size > 1 else 0.0
    of_teacher = teacher_shape(args, shape)
    teacher = of_teacher and TeacherMemory(args, shape, of_teacher, e)
    heads = 0 if args.attention_transfer else 1 + shape.mtp_num_layers

    def mtp(held: int) -> dict[str, float]:
        """Its layers, each with an embedding, both norms' outputs, and K,V laid out anew."""
        if not held:
            return {}
        stored = _stored_for_recompute if recomputed_layers(args, "mtp", 1) else _stored_whole
        layer = rows * stored(args, shape.of_mtp, "cross_decoder", split)
        own_kv = e * read_kv if args.context_parallel_size > 1 or _lays_out(args) else 0.0
        each = layer + 3 * e * rows * shape.hidden_size / split + own_kv
        return {"mtp": shape.mtp_num_layers * each}

    def of_chunk(
        chunk: Parts, read: range, arriving: range, of_memory: tuple[bool, bool], source: int | None
    ) -> dict[str, float]:
        """Stored for one micro-batch."""
        arrived = shape.shared_kv_sets - read.start if read else len(arriving)
        layers = {}
        for kind in kinds:
            count = chunk.get(kind, 0)
            recomputed = recomputed_layers(args, kind, count, source)
            layers[kind] = recomputed * again[kind] + (count - recomputed) * plain[kind]
        if any(of_memory):
            layers["memory of units"] = e * memory * (tokens if chunk.get("self_decoder") else rows)
        return layers | {
            "shared K,V": tokens * (2 * e * shape.hidden_size / split + normed_k / tp) * chunk.get("shared_kv", 0)
            + e * (len(read) * read_kv + arrived * arrived_kv),
            **mtp(chunk.get("mtp", 0)),
            "head": heads * 2 * e * rows * shape.hidden_size / split * chunk.get("output_layer", 0),
            **({"teacher's hidden states": teacher.stored(chunk, tokens, rows, split)} if teacher else {}),
        }

    def held_on(kind: str, chunk: Parts, source: int | None = None) -> float:
        """By Megatron, which keeps the weights of a layer's experts, and with them recompute's copy of its input, and
        that copy's gradient, until it comes to the layer again: as much as all inputs of these layers."""
        layers = recomputed_layers(args, kind, chunk.get(kind, 0), source) * shape.experts_share(kind)
        return layers * positions[kind] * e * shape.hidden_size / split

    each = [of_chunk(chunk, *of_kv) for chunk, of_kv in zip(chunks, sets)]

    def added(chunk: Parts, sizes: Mapping[str, float], source: int | None) -> float:
        """Beside what is stored, while the backward pass of one micro-batch goes through a chunk."""
        loss = _loss(args, shape, rows) if chunk.get("output_layer") else 0.0
        peak = loss
        for kind in kinds:
            count = chunk.get(kind, 0)
            recomputed = recomputed_layers(args, kind, count, source)
            # Free by then: what the cross-decoder stored, when the self-decoder's backward begins.
            free = gradient = 0.0
            if kind == "self_decoder":
                free = sizes.get("cross_decoder", 0.0) - 2 * held_on("cross_decoder", chunk)
            elif kind == "cross_decoder":
                gradient = 4 * (read_kv + memory * rows * ("memory of units" in sizes))
            if count > recomputed:
                layer = positions[kind] * _layer_in_backward(args, shape, kind, split, recompute=False)
                peak = max(peak, loss + layer + gradient - free)
            if recomputed:
                # Large, but what the loss needed is free again, and what layers behind it stored.
                layer = positions[kind] * _layer_in_backward(args, shape, kind, split, recompute=True)
                behind = (count - recomputed) * plain[kind]
                peak = max(peak, layer + held_on(kind, chunk, source) + gradient - free - behind - sizes["head"])
        if teacher:
            # Before the student's layers; in attention transfer beside each of them.
            behind = 0.0 if args.attention_transfer else sum(sizes.values())
            peak = max(peak, teacher.layer_in_forward(tokens, split) - behind)
        return peak

    stored, extra = (
        [sum(sizes.values()) for sizes in each],
        [added(*one) for one in zip(chunks, each, (shared[-1] for shared in sets))],
    )
    begun, active = max(moments, key=lambda moment: sum(map(mul, moment[0], stored)) + extra[moment[1]])
    parts = _states(args, shape, chunks)
    if teacher:
        parts["teacher"] = teacher.weights(chunks)
    for name in dict.fromkeys(name for sizes in each for name in sizes):
        parts[name] = sum(count * sizes.get(name, 0.0) for count, sizes in zip(begun, each))
    most = shape.shared_kv_sets if shape.architecture == "yoco" else 0
    crossing = (
        e * (tokens * shape.hidden_size / split + most * arrived_kv + tokens * memory) if len(chunks) > 1 else 0.0
    )
    crossing += teacher.crossing(tokens, split) if teacher and crossing else 0.0
    return Memory(parts | {"loss and layer in backward": extra[active], "crossing stages": EXCHANGED * crossing})


def _states(args: Namespace, shape: ModelShape, chunks: Sequence[Parts]) -> dict[str, float]:
    """Kept between steps."""
    tp = args.tensor_model_parallel_size
    parts = of_rank(chunks)
    dense, routed = held_parameters(args, shape, parts)
    held = dense + routed
    in_layers = sum(parts.get(kind, 0) * count for kind, count in layer_matmul_parameters(shape).items()) / tp
    shards = data_parallel_size(args) * args.context_parallel_size if is_distributed(args) else 1
    # All ranks of a stage together hold it once, however experts are divided.
    expert_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp)
    optimizer_held = dense + routed * expert_ranks / tp if is_distributed(args) else held
    low = _bytes_of_a_value(args) == 2
    trained = _trained_share(args, shape, parts)
    optimizer = bytes_of_a_parameter(args, shape, parts)
    # Transformer Engine keeps each matrix in FP8 twice, for the products of forward and of backward.
    copies = 2 * in_layers if args.fp8 and not args.fp8_param_gather else 0
    return {
        "weights": held * (2 if low else 4) + copies,
        "gradients": held * 4 * trained,
        "optimizer": optimizer_held * optimizer / shards * trained,
    }


def _trained_share(args: Namespace, shape: ModelShape, parts: Parts) -> float:
    """Of the parameters that a rank holds; attention transfer trains the projections of attention alone."""
    if not args.attention_transfer:
        return 1.0
    attention = attention_parameters(shape)
    return sum(parts.get(kind, 0) * count for kind, count in attention.items()) / stage_parameters(parts, shape)


def _bytes_of_a_value(args: Namespace) -> int:
    """In the dtype of training."""
    return 2 if args.bf16 or args.fp16 else 4


def _kv_values(args: Namespace, shape: ModelShape, tokens: float) -> float:
    """Of one set of the shared K,V as the layers of a stage read it: of the whole sequence, unless queries travel; of
    packed documents in several samples a second time, laid end to end (model/cross_decoder/document_attention.py)."""
    if shape.architecture != "yoco":
        return 0.0
    cp = args.context_parallel_size if travelling(args, shape) == "keys" else 1
    copies = 2 if _lays_out(args) and cp == 1 else 1
    return copies * tokens * cp * shape.kv_width / args.tensor_model_parallel_size


def _lays_out(args: Namespace) -> bool:
    """Whether cross attention needs copies in which the documents of several samples lie end to end."""
    return args.dataloader_inter_document_masking and args.micro_batch_size > 1


def _mixer_bytes(args: Namespace, shape: ModelShape, kind: str) -> float:
    """A token of a layer stores for what mixes tokens, before tensor parallelism."""
    e, heads = _bytes_of_a_value(args), shape.num_attention_heads
    if kind == "self_decoder":
        own_heads = shape.self_decoder_heads + shape.self_decoder_query_groups
        of_attention = _normed(shape, e, own_heads, shape.self_decoder_head_dim) + _halos(args, shape)
        return shape.mean(
            lambda mixer: mixer.stored_bytes(shape, e) + (of_attention if mixer.is_softmax_attention else 0.0)
        )
    queries = e * heads * shape.kv_channels
    attention = 2 * queries + 4 * heads + _normed(shape, e, heads, shape.kv_channels)
    if kind == "decoder":
        return attention + e * shape.kv_width + _normed(shape, e, shape.num_query_groups, shape.kv_channels)
    of_units = 2 * e * memory_width(shape)  # the gate, and the product; the memory once for all
    share = shape.attention_share
    return share * (attention + _lays_out(args) * queries) + (1 - share) * of_units


def _halos(args: Namespace, shape: ModelShape) -> float:
    """A token of the self-decoder's attention stores more with context parallelism: each of two chunks has W - 1 more
    keys and values, copies of queries on as many rows, and outputs of these (model/layers/chunked_attention.py)."""
    cp = args.context_parallel_size
    if cp == 1:
        return 0.0
    more = 2 * (shape.self_decoder_window - 1) * cp / args.seq_length
    queries = shape.self_decoder_heads * shape.self_decoder_head_dim
    kv = 2 * shape.self_decoder_query_groups * shape.self_decoder_head_dim
    return _bytes_of_a_value(args) * (2 * queries * (1 + more) + kv * more)


def _normed(shape: ModelShape, bytes_per_value: int, heads: int, width: int) -> float:
    """A token of the norm of so many heads of queries or keys stores: its input, and an fp32 figure a head."""
    return shape.qk_layernorm * heads * (bytes_per_value * width + 4)


def _stored_for_recompute(args: Namespace, shape: ModelShape, kind: str, split: int) -> float:
    """Bytes a token that one layer under full recompute stores until its backward pass; `split`: ranks that share the
    hidden states."""
    kept = _stored_attention(args, shape) if kind == "cross_decoder" else 0.0
    return _bytes_of_a_value(args) * shape.hidden_size / split + kept / args.tensor_model_parallel_size


def _stored_whole(args: Namespace, shape: ModelShape, kind: str, split: int) -> float:
    """The same of one without full recompute."""
    e, hidden = _bytes_of_a_value(args), shape.hidden_size
    if args.attention_transfer:  # the normed input, and in fp32 how far its output is off the teacher's
        return (e + 4) * hidden / split + _mixer_bytes(args, shape, kind) / args.tensor_model_parallel_size
    # FP8 stores the inputs of linear layers in a byte a value, but those of attention's, which its kernel stores.
    of_linear = 1 if args.fp8 else e
    norms = 0 if _recomputes(args, "layernorm") else 2 * of_linear * hidden
    dense, routed = shape.ffn_widths(kind)
    inner = 0.0 if _recomputes(args, "mlp") else (2 * e + of_linear) * dense
    if args.architecture == "yoco" and args.recompute_elementwise:
        inner -= e * dense
        if kind == "self_decoder":
            inner -= e * shape.mean(lambda mixer: mixer.recomputed_values(shape))
    inner += 3 * e * routed + shape.experts_share(kind) * _rows_of_experts(args, shape)
    inner += _mixer_bytes(args, shape, kind)
    return (2 * e * hidden + norms) / split + inner / args.tensor_model_parallel_size


def _rows_of_experts(args: Namespace, shape: ModelShape) -> float:
    """Bytes of a token's copies for the experts that it goes through, before tensor parallelism: each of the ranks that
    share an expert has them whole."""
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return _bytes_of_a_value(args) * shape.moe_router_topk * shape.hidden_size * expert_tp


def _recomputes(args: Namespace, module: str) -> bool:
    """Whether selective recompute covers `module`."""
    return args.recompute_granularity == "selective" and module in (args.recompute_modules or ["core_attn"])


def _layer_in_backward(args: Namespace, shape: ModelShape, kind: str, split: int, recompute: bool) -> float:
    """Bytes a token that the backward pass of one layer needs beside what was stored: gradients inside the FFN, and
    gathered inputs; with full recompute what the layer would have stored, and the gradient of the FFN's product."""
    e, tp, share = _bytes_of_a_value(args), args.tensor_model_parallel_size, shape.experts_share(kind)
    ffn = e * shape.ffn_hidden_size / tp / args.mlp_chunks_for_training if share < 1 else 0.0
    # Of all their rows copies sorted, sent and received, forward as backward; by the dry run.
    rows = 5 * _rows_of_experts(args, shape) / tp if share else 0.0
    if args.attention_transfer:
        return 3 * e * shape.hidden_size + _mixer_bytes(args, shape, kind) / tp
    if not recompute:
        again = 3 * ffn if _recomputes(args, "mlp") else 0.0
        return max(3 * ffn + again, rows) + 3 * e * shape.hidden_size
    mixer = _mixer_bytes(args, shape, kind) - (_stored_attention(args, shape) if kind == "cross_decoder" else 0.0)
    hidden = e * shape.hidden_size / split
    # Of the FFN: its input, two norms' outputs, its gradient; gate, up and their gradients, and the product's.
    # Of the mixer: its input, its output, the gradients of these two; what it stores, and its gradient.
    of_mixer = 2 * mixer
    if kind == "cross_decoder" and args.context_parallel_size > 1:
        # In parts of the keys (attention_in_parts.py): output and gradients of all and of a part, and cuDNN's own.
        queries = shape.num_attention_heads * shape.kv_channels
        of_mixer = 5 * e * queries + e * shape.kv_width + 3 * CUDNN_BYTES * queries
    of_ffn = max(5 * ffn, share and rows + 3 * e * shape.ffn_widths(kind)[1] / share / tp)
    return 4 * hidden + max(mixer / tp + of_ffn, of_mixer / tp)


def _stored_attention(args: Namespace, shape: ModelShape) -> float:
    """Bytes a token that --keep-cross-attention stores in a layer of the cross-decoder: the output and, for each query,
    the fp32 logarithm of its softmax's sum; for documents of several samples the queries as the kernel reads them, too
    (model/layers/recompute.py)."""
    if args.architecture != "yoco" or not args.keep_cross_attention:
        return 0.0
    heads = shape.num_attention_heads * shape.attention_share
    return heads * (1 + _lays_out(args)) * _bytes_of_a_value(args) * shape.kv_channels + 4 * heads


def _loss(args: Namespace, shape: ModelShape, rows: float) -> float:
    """Bytes of the loss of `rows` positions: logits in the dtype of training, and in fp32 their softmax.

    With --loss-chunk-size the logits of a chunk alone, which their gradient replaces, in the dtype of training; and the
    output layer's gradient in fp32 where it is not added to Megatron's buffer (ops/linear_cross_entropy/torch.py).
    """
    if not shape.padded_vocab_size or args.attention_transfer:
        return 0
    vocab_rows = shape.vocab_rows / args.tensor_model_parallel_size
    if not args.loss_chunk_size:
        return (_bytes_of_a_value(args) + 4) * rows * vocab_rows
    logits = _bytes_of_a_value(args) * min(args.loss_chunk_size, rows) * vocab_rows
    # Each loss keeps those of its last chunk until backward, and those of a teacher beside them.
    logits *= 1 + shape.mtp_num_layers + (args.teacher is not None)
    return logits + (0 if args.gradient_accumulation_fusion else 4 * vocab_rows * shape.hidden_size)
