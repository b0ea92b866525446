"""The flags of a run with tiny widths: of its model on its mesh, and of the same model in one process.

Layers keep their number, kind and place; the ratio of query to key heads stays up to four. Sizes that a mesh divides
are multiples of its ranks. All is in fp32, where two orders of a sum differ by 1e-6 and not by 1e-2.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

from yoco_megatron.mixers import options_of_others

GROUPS = ("transformer configuration", "network size", "moe", "YOCO")
"""Of the parser: flags of models are in these."""
MODEL_ELSEWHERE = {"dataloader-inter-document-masking"}
MESH = {
    *("tensor-model-parallel-size", "sequence-parallel", "context-parallel-size", "pipeline-model-parallel-size"),
    *(
        "pipeline-model-parallel-layout",
        "num-virtual-stages-per-pipeline-rank",
        "num-layers-per-virtual-pipeline-stage",
    ),
    *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "no-overlap-p2p-communication"),
    *("microbatch-group-size-per-virtual-pipeline-stage", "overlap-p2p-communication-warmup-flush"),
    *("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"),
    *("expert-model-parallel-size", "expert-tensor-parallel-size", "use-distributed-optimizer"),
    *("overlap-grad-reduce", "overlap-param-gather", "recompute-granularity", "recompute-method"),
    *("recompute-num-layers", "recompute-modules", "recompute-activations", "keep-cross-attention"),
    *("recompute-elementwise", "loss-chunk-size", "mlp-chunks-for-training"),
    *("ddp-num-buckets", "ddp-bucket-size", "ddp-pad-buckets-for-high-nccl-busbw", "ddp-average-in-collective"),
    *("ddp-reduce-scatter-with-fp32-accumulation", "no-gradient-reduce-div-fusion", "no-align-grad-reduce"),
    *("num-distributed-optimizer-instances", "use-megatron-fsdp", "use-torch-fsdp2"),  # for the trainer to refuse
}
"""How the model is computed: one process does without."""
LEFT_OUT = {
    *("bf16", "fp16", "fp32-residual-connection", "transformer-impl", "attention-backend", "flash-attention-version"),
    *("cuda-graph-impl", "cuda-graph-warmup-steps", "kv-channels", "make-vocab-size-divisible-by", "config-logger-dir"),
    *("retention-backend", "retention-chunk-size", "config", "verbose", "allow-changed-data", "sample-packing"),
    *("cross-entropy-loss-fusion", "cross-entropy-fusion-impl", "use-cpu-initialization"),
}
STARTS_LEFT_OUT = ("fp8", "fp4", "no-fp8", "first-last", "num-layers-at", "tp-comm", "no-tp-comm", "evaluate-")
EXPERT_KERNELS = ("moe-grouped-gemm", "moe-permute-fusion", "moe-router-fusion", "moe-router-padding")
REFUSED = ("teacher",)
WIDTH = 16
"""Of a head."""


def flags(args: Namespace, parser: ArgumentParser, data_parallel: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of the mesh, those of one process), as a config has them.

    Args:
        args: parsed, with `resolved_config`, what the user gave.
        data_parallel: ranks of it.
    Raises:
        ValueError: a part that is not compared.
    """
    for name in REFUSED:
        if name in args.resolved_config:
            raise ValueError(f"--{name}: gradients are compared without it; leave it out")
    kept = {name: value for name, value in args.resolved_config.items() if name in _of_models(parser)}
    tiny = kept | _sizes(args, kept) | _run(args, data_parallel)
    if kept.get("loss-chunk-size", 1):
        tiny["loss-chunk-size"] = 13  # of tokens: so few that there are several, of which the last is smaller
    alone = {name: value for name, value in tiny.items() if name not in MESH}
    if args.architecture == "yoco":
        alone["loss-chunk-size"] = 8192 if args.z_loss_coeff else 0  # all tokens at once; the z-loss needs chunks
    return tiny, alone


def left_out(args: Namespace, parser: ArgumentParser) -> list[str]:
    """What the user gave of data, precision, optimizer and logs, which the check has of its own."""
    return sorted(args.resolved_config.keys() - _of_models(parser))


def _of_models(parser: ArgumentParser) -> set[str]:
    """Names of flags, those of meshes among them."""
    names = {
        name.lstrip("-").replace("_", "-")
        for group in parser._action_groups
        if group.title in GROUPS
        for action in group._group_actions
        for name in action.option_strings
    }
    out = {name for name in names if name.startswith((*STARTS_LEFT_OUT, *EXPERT_KERNELS))}
    return (names | MODEL_ELSEWHERE | MESH) - LEFT_OUT - out


def _sizes(args: Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """Widths, heads, length and vocabulary that the mesh can divide."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    grouped = bool(args.group_query_attention and args.num_query_groups)
    groups = 2 * tp
    heads = groups * (max(1, min(4, args.num_attention_heads // args.num_query_groups)) if grouped else 1)
    length = max(32, 16 * tp * cp)
    found: dict[str, Any] = {
        "hidden-size": heads * WIDTH,
        "ffn-hidden-size": 24 * tp,
        "num-attention-heads": heads,
        "seq-length": length,
        "max-position-embeddings": length,
        "make-vocab-size-divisible-by": 1,
        "vocab-size": 64 * tp,
    }
    if grouped:
        found["num-query-groups"] = groups
    if args.architecture == "yoco":
        found |= {"self-decoder-heads": groups, "self-decoder-head-dim": 2 * WIDTH}
    own = {
        "self-decoder-query-groups": tp,
        "moe-ffn-hidden-size": 8 * (args.expert_tensor_parallel_size or tp),
        "moe-shared-expert-intermediate-size": 8 * tp,
    }
    without = options_of_others(args.self_decoder)
    if "self_decoder_window" not in without:
        found["self-decoder-window"] = 7  # reaches over the edge of what a rank holds
    if "mamba_num_heads" not in without:
        found |= {"mamba-num-heads": 2 * tp, "mamba-head-dim": WIDTH, "mamba-state-dim": 24, "mamba-num-groups": tp}
    return found | {name: value for name, value in own.items() if name in kept}


def _run(args: Namespace, data_parallel: int) -> dict[str, Any]:
    """One step of random tokens: micro-batches enough to fill a pipeline twice."""
    micro_batches = 2 * args.pipeline_model_parallel_size
    return {
        "micro-batch-size": 1,
        "global-batch-size": data_parallel * micro_batches,
        "train-iters": 1,
        "lr": 1e-3,
        "clip-grad": 0.0,  # it would scale the gradients
        "mock-data": True,
        "tokenizer-type": "NullTokenizer",
        "eval-iters": 0,
        "num-workers": 0,
    }
