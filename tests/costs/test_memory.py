"""Memory of the fullest GPU, estimated from flags."""

from argparse import Namespace

import pytest
from support.cli import parsed

from yoco_megatron.costs import memory, stage_time
from yoco_megatron.costs.optimizer import newton_schulz_flops
from yoco_megatron.costs.shape import ModelShape, parameter_count


@pytest.mark.parametrize(
    ("processes", "flags", "bytes_per_parameter"),
    [
        (1, [], 16),  # fp32: weight, gradient, two moments
        (1, ["--bf16"], 18),  # bf16 weight, fp32 gradient, fp32 weight, two moments
        (2, ["--bf16"], 18),
        (2, ["--bf16", "--use-distributed-optimizer"], 12),  # 2 + 4 + 12/2
        (2, ["--bf16", "--tensor-model-parallel-size", "2"], 9),
    ],
)
def test_states(processes, flags, bytes_per_parameter):
    args = parsed(processes, *flags)
    count = sum(parameter_count(ModelShape.from_args(args)).values())
    assert memory.gpu_memory(args).states == pytest.approx(count * bytes_per_parameter)


@pytest.mark.parametrize(("more", "shards"), [([], 1), (["--use-distributed-optimizer"], 2)])
def test_states_of_muon(more, shards):
    """One moment less in the matrices of two layers of each half, of the shared K,V and of four FFNs."""
    matrices = (2 * 5 + 2 * 2) * 32 * 32 + 2 * 16 * 32 + 4 * 3 * 32 * 64
    adam = memory.gpu_memory(parsed(2, "--bf16", *more)).parts
    muon = memory.gpu_memory(parsed(2, "--bf16", *more, "--optimizer", "muon")).parts
    assert adam["optimizer"] - muon["optimizer"] == pytest.approx(4 * matrices / shards)
    assert adam["gradients"] == muon["gradients"]


def test_newton_schulz():
    """Of the FFNs, whose matrices are 64 x 32, and of others, 32 x 32 but for K,V, 16 x 32, and the projections of
    multi-token prediction, 32 x 64; five iterations."""
    args = parsed(1, "--optimizer", "muon", "--mtp-num-layers", "2")
    held = {"self_decoder": 2, "shared_kv": 1, "cross_decoder": 2, "mtp": 1}
    ffn, square = (4 * 32**2 * long + 2 * 32**3 for long in (64, 32))
    kv = 4 * 16**2 * 32 + 2 * 16**3
    expected = 5 * ((6 * 3 + 2) * ffn + (2 * 5 + 4 * 2) * square + 2 * kv)
    assert newton_schulz_flops(args, ModelShape.from_args(args), held) == expected


def test_multi_token_prediction_attends_whatever_other_layers_do():
    """On a rank that has nothing else, too."""
    stages = [{"embedding": 1, "self_decoder": 2, "shared_kv": 1, "cross_decoder": 2}, {"mtp": 1, "output_layer": 1}]
    found = []
    for more in ([], ["--self-decoder-pattern", "RS"], ["--cross-decoder-pattern", "GA"]):
        args = parsed(2, "--mtp-num-layers", "1", "--pipeline-model-parallel-size", "2", *more)
        shape = ModelShape.from_args(args)
        (last,) = set(stage_time.shapes_of_ranks(stages, shape, 2)[1:])
        seconds = stage_time.part_seconds_of_run(last, args)["mtp"]
        found.append((memory.rank_memories(args, shape, stages)[1].parts["mtp"], seconds))
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_the_source_of_a_memory_is_not_recomputed():
    shape = ModelShape.from_args(parsed(1, "--self-decoder-pattern", "RS", "--cross-decoder-pattern", "GA"))
    stages = [{"self_decoder": 1}, {"self_decoder": 1, "cross_decoder": 2}]
    assert stage_time.memory_sources(stages, shape) == [0, None]
    full = ["--recompute-granularity", "full", "--recompute-num-layers", "2", "--recompute-method"]
    block, uniform = (parsed(1, *full, method) for method in ("block", "uniform"))

    def recomputed(args: Namespace, *sources: int | None) -> list[int]:
        return [stage_time.recomputed_layers(args, "self_decoder", 5, source) for source in sources]

    assert recomputed(block, None, 0, 1, 2) == [2, 1, 1, 2]
    assert recomputed(uniform, None, 0, 4) == [5, 4, 4]


def test_states_of_experts():
    """Ranks share experts, and nothing else: two of 4 in each of 4 layers, 3 x 32 x 48 weights in each."""
    experts = ["--num-experts", "4", "--moe-ffn-hidden-size", "48", "--use-distributed-optimizer"]
    whole = memory.gpu_memory(parsed(2, *experts)).parts
    divided = memory.gpu_memory(parsed(2, *experts, "--expert-model-parallel-size", "2")).parts
    half = 4 * 4 * 3 * 32 * 48 / 2
    assert whole["weights"] - divided["weights"] == whole["gradients"] - divided["gradients"] == 4 * half
    assert whole["optimizer"] == divided["optimizer"]


def test_more_activations_with_longer_sequences_fewer_with_recompute():
    whole_logits = ["--loss-chunk-size", "0"]
    plain = memory.gpu_memory(parsed(1, *whole_logits)).activations
    assert memory.gpu_memory(parsed(1, *whole_logits, "--seq-length", "64")).activations == pytest.approx(2 * plain)
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    assert memory.gpu_memory(parsed(1, *full)).activations < plain


@pytest.mark.parametrize(("dtype", "bytes_of_a_logit"), [([], 4), (["--bf16"], 2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("fused", "bytes_of_a_gradient"), [(True, 0), (False, 4)], ids=["fused", "not fused"])
def test_loss_in_chunks_needs_the_logits_of_a_chunk(fused, bytes_of_a_gradient, dtype, bytes_of_a_logit):
    """64 tokens, 256 words, 32 wide; all at once: in the dtype of training and in fp32. No chunk is longer."""

    def activations(*flags: str) -> int:
        args = parsed(1, *dtype, *flags)
        args.gradient_accumulation_fusion = fused
        return memory.gpu_memory(args).activations

    for chunk, tokens in (("16", 16), ("4096", 64)):
        saved = (bytes_of_a_logit + 4) * 64 * 256 - bytes_of_a_logit * tokens * 256 - bytes_of_a_gradient * 256 * 32
        whole = activations("--loss-chunk-size", "0")
        assert whole - activations("--loss-chunk-size", chunk) == saved
    assert activations() == activations("--loss-chunk-size", "8192")


@pytest.mark.parametrize(("kind", "also"), [("gated_retention", 32), ("sliding_window", 0)])
def test_what_is_made_again_in_backward_is_not_kept(kind, also):
    """64 tokens in bf16; two layers of each half, 64 wide in the FFN, retention 32."""

    def activations(*flags: str) -> int:
        return memory.gpu_memory(parsed(1, "--bf16", "--self-decoder", kind, *flags)).activations

    assert activations() - activations("--recompute-elementwise") == 2 * 64 * (4 * 64 + 2 * also)


def test_cache_of_several_sets():
    per_token, fixed = memory.cache_bytes(ModelShape.from_args(parsed(1)), 2)
    assert memory.cache_bytes(ModelShape.from_args(parsed(1, "--shared-kv-sets", "2")), 2) == (2 * per_token, fixed)


def test_attention_that_is_kept():
    """64 tokens in bf16, two cross-decoder layers, 32 wide: outputs, and an fp32 number a token and head."""

    def of(*flags: str) -> float:
        full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return memory.gpu_memory(parsed(1, "--bf16", *full, *flags)).parts["cross_decoder"]

    args = parsed(1)
    saved = of("--keep-cross-attention") - of()
    assert saved == 2 * 64 * (2 * 32 + 4 * args.num_attention_heads)
    packed = ("--dataloader-inter-document-masking", "--micro-batch-size", "2")
    copied = of("--keep-cross-attention", *packed) - of(*packed)
    tokens = 64 * 2 // args.micro_batch_size
    assert copied == 2 * tokens * (2 * (32 + 32) + 4 * args.num_attention_heads)
