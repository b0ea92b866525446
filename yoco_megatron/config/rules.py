"""Every rule that sizes and meshes must obey, as one clear error that names the flag and the fix.

Checked on the parsed arguments, before a process group or a GPU is touched, and again by `YOCOConfig` for those who
build models from Python.
"""

from argparse import ArgumentParser, Namespace
from itertools import pairwise
from typing import Any

from yoco_megatron.config import memory_units
from yoco_megatron.mixers import mixers_in, options_of_others
from yoco_megatron.utils.errors import require

# What a whole step recorded as one CUDA graph leaves no room for: it holds kernels, not what the host decides between.
NOT_IN_A_CUDA_GRAPH = {
    "dataloader_inter_document_masking": "the host reads where documents end",
    "loss_suffix": "the host takes the positions with a loss",
    "step_batch_size_schedule": "a graph has one number of micro-batches",
    "check_for_spiky_loss": "the host reads the loss",
    "timing_log_level": "Megatron's timers wait for the GPU",
    "log_straggler": "the detector's timers wait for the GPU",
}


# Those that Megatron builds from the package emerging-optimizers; they have the matrices of layers, Adam all else.
MATRIX_OPTIMIZERS = ("muon", "lion")
# Flags of Megatron's own loss.
OF_MEGATRONS_LOSS = ("fp16_lm_cross_entropy", "cross_entropy_loss_fusion")


def require_divides(divisor: int, number: int, number_name: str, divisor_name: str, fix: str) -> None:
    """Raise ValueError unless `number` is a multiple of `divisor`."""
    require(
        divisor > 0 and number % divisor == 0,
        f"{number_name} {number} is not a multiple of {divisor_name} {divisor}: {fix}",
    )


def require_sizes(config: Any) -> None:
    """Raise ValueError for a size below 1; None is one that is not resolved yet."""
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels"):
        size = getattr(config, dest)
        require(size is None or size >= 1, f"--{dest.replace('_', '-')} {size} must be at least 1")


def check_sizes(config: Any) -> None:
    """Rules of the sizes of a model of either architecture. `config` has the fields of ModelShape, all resolved."""
    require_sizes(config)
    heads, groups = config.num_attention_heads, config.num_query_groups
    require_divides(groups, heads, "--num-attention-heads", "--num-query-groups", "each K,V head serves a whole group")
    require(
        config.architecture in ("yoco", "transformer"),
        f"--architecture {config.architecture} is unknown: use yoco or transformer",
    )
    mixers = mixers_in(config.self_decoder)
    if config.architecture == "transformer":
        return
    n_self, self_heads = config.num_self_decoder_layers, config.self_decoder_heads
    require(
        0 <= n_self < config.num_layers,
        f"--num-self-decoder-layers {n_self} must lie between 0 and --num-layers - 1 = {config.num_layers - 1}: "
        "at least one layer has to read the shared K,V (for a model without one use --architecture transformer)",
    )
    require_divides(
        config.shared_kv_sets,
        config.num_layers - n_self,
        "the number of cross-decoder layers",
        "--shared-kv-sets",
        "groups of as many layers read one K,V each",
    )
    _check_sources(config)
    self_groups, fix = config.self_decoder_query_groups, "each K,V head serves a whole group"
    require_divides(self_groups, self_heads, "--self-decoder-heads", "--self-decoder-query-groups", fix)
    head_dims = {"--num-attention-heads or --kv-channels": config.kv_channels}
    if n_self:
        head_dims["--self-decoder-heads or --self-decoder-head-dim"] = config.self_decoder_head_dim
        require(
            self_groups == self_heads or "self_decoder_query_groups" not in options_of_others(config.self_decoder),
            f"--self-decoder-query-groups {self_groups}: no layer of --self-decoder {config.self_decoder} has K,V "
            "heads that queries share; remove it",
        )
        for mixer in mixers:
            mixer.check(config)
    memory_units.check_pattern(config)
    for flags, head_dim in head_dims.items():
        require(
            head_dim % 2 == 0, f"{flags} gives heads of odd width {head_dim}: RoPE rotates pairs, choose an even one"
        )


def _check_sources(config: Any) -> None:
    """Rules of --shared-kv-sources."""
    given = getattr(config, "shared_kv_sources", None)
    if given is None:
        return
    told, n_self = f"--shared-kv-sources {' '.join(map(str, given))}", config.num_self_decoder_layers
    ascending = all(first < second for first, second in pairwise(given))
    require(
        bool(given) and ascending and given[0] >= 1 and given[-1] <= n_self,
        f"{told} must be layers of the self-decoder in ascending order, from 1 to --num-self-decoder-layers {n_self}",
    )
    fix = f"each of the {len(given)} projects to as many sets"
    require_divides(len(given), config.shared_kv_sets, "--shared-kv-sets", "the number of --shared-kv-sources", fix)


def check_model(config: Any) -> None:
    """Rules of a YOCO without its mesh, and of tensor parallelism. `config` has the fields of YOCOConfig, resolved."""
    check_sizes(config)
    check_loss_chunk(config)
    require(
        not (config.recompute_elementwise and config.fp8),
        "--recompute-elementwise is for bf16: with --fp8-format the linear layers keep quantised copies; remove it",
    )
    require(
        not config.keep_cross_attention or config.recompute_granularity == "full",
        "--keep-cross-attention is an exception from --recompute-granularity full: set both, or remove it",
    )
    for dest in ("attention_dropout", "hidden_dropout"):
        require(
            not (config.keep_cross_attention and getattr(config, dest)),
            f"--keep-cross-attention does not go with --{dest.replace('_', '-')} {getattr(config, dest)}, whose random "
            "numbers would be others in the second pass: use only one of them",
        )
    require(config.self_decoder_window >= 2, f"--self-decoder-window {config.self_decoder_window} must be at least 2")
    require(config.decay_temperature > 0, f"--decay-temperature {config.decay_temperature} must be positive")
    require(config.retention_chunk_size >= 1, "--retention-chunk-size must be at least 1")
    check_tensor_parallel(config)


def check_loss_chunk(config: Any) -> None:
    """Of every architecture."""
    require(
        config.loss_chunk_size >= 0,
        f"--loss-chunk-size {config.loss_chunk_size} must be at least 0 (0: all tokens at once)",
    )
    require(
        not config.z_loss_coeff or config.loss_chunk_size > 0,
        f"--z-loss-coeff {config.z_loss_coeff} is of the loss in chunks: set --loss-chunk-size (8192), without flags "
        "of Megatron's own loss",
    )


def check_tensor_parallel(config: Any) -> None:
    """Tensor parallelism splits heads, K,V heads and the FFN."""
    tp = config.tensor_model_parallel_size
    name = "--tensor-model-parallel-size"
    split = {
        "--num-attention-heads": config.num_attention_heads,
        "--num-query-groups": config.num_query_groups,
        "--ffn-hidden-size": config.ffn_hidden_size,
    }
    if config.num_self_decoder_layers:
        for mixer in mixers_in(config.self_decoder):
            split |= mixer.divided(config)
    for flag, size in split.items():
        require_divides(
            tp, size, flag, name, f"heads are split over tensor-parallel ranks, use a {name} that divides {size}"
        )


def flag_against_parts(config: Any) -> str | None:
    """The flag that asks for what attention over parts of the keys (ops/attention/partial.py) cannot do, if any."""
    backend = getattr(config, "attention_backend", "auto")  # plans leave it out, or have its name
    asked = {
        "--deterministic-mode": config.deterministic_mode,
        "--attention-dropout": config.attention_dropout > 0,
        "fp8_dot_product_attention": getattr(config, "fp8_dot_product_attention", False),  # has no flag
        "--attention-backend": getattr(backend, "name", backend) not in ("auto", "fused"),
    }
    return next((flag for flag, is_asked in asked.items() if is_asked), None)


def check_travelling_queries(args: Namespace) -> None:
    """--cp-cross-attention queries, where it cannot be done."""
    if args.cp_cross_attention != "queries":
        return
    require(
        args.cross_decoder_positions == "loss",
        "--cp-cross-attention queries does not go with --cross-decoder-positions all: remove one of them",
    )
    require(
        not args.has_loss_masks,
        "--cp-cross-attention queries does not go with data with loss masks, whose positions begin anywhere: use auto",
    )
    require(
        not args.dataloader_inter_document_masking,
        "--cp-cross-attention queries does not go with packed documents that do not attend to each other "
        "(--dataloader-inter-document-masking, which --sample-packing documents switches on): use auto",
    )
    flag = flag_against_parts(args)
    require(flag is None, f"--cp-cross-attention queries does not go with {flag}: use auto, or remove one of them")


def check_mesh(args: Namespace) -> None:
    """Rules of the mesh: how processes, pipeline, sequence and batch divide."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    model_parallel = tp * pp * cp
    for flag, size in (
        ("--tensor-model-parallel-size", tp),
        ("--pipeline-model-parallel-size", pp),
        ("--context-parallel-size", cp),
    ):
        require(size >= 1, f"{flag} {size} must be at least 1")
    require(
        args.world_size % model_parallel == 0,
        f"{args.world_size} processes cannot be divided into --tensor-model-parallel-size {tp} x "
        f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = {model_parallel}: start a multiple of "
        f"{model_parallel} processes or make the mesh smaller",
    )
    require(
        cp == 1 or args.architecture == "yoco" or args.transformer_impl == "transformer_engine",
        f"--context-parallel-size {cp} of --architecture transformer is Transformer Engine's: set --transformer-impl "
        "transformer_engine, or use --sequence-parallel with --tensor-model-parallel-size",
    )
    if cp > 1 and args.architecture == "yoco":
        for mixer in mixers_in(args.self_decoder):
            mixer.require("received_bytes", f"--context-parallel-size {cp}")
    if args.seq_length is not None:
        if cp > 1:
            two_chunks = "each rank holds two chunks of it"
            require_divides(2 * cp, args.seq_length, "--seq-length", f"2 x --context-parallel-size {cp} =", two_chunks)
        if args.sequence_parallel and tp > 1:
            name = "--tensor-model-parallel-size" + (f" {tp} x --context-parallel-size {cp} =" if cp > 1 else "")
            require_divides(tp * cp, args.seq_length, "--seq-length", name, "--sequence-parallel splits it")
    if args.global_batch_size is not None and args.micro_batch_size is not None:
        data_parallel = args.world_size // model_parallel
        require_divides(
            args.micro_batch_size * data_parallel,
            args.global_batch_size,
            "--global-batch-size",
            f"--micro-batch-size {args.micro_batch_size} x {data_parallel} data-parallel ranks =",
            "change one of them",
        )


def check_length(args: Namespace) -> None:
    """Of a run's sequences, beside that of the model."""
    most = args.max_position_embeddings
    require(
        most is None or most >= args.seq_length,
        f"--max-position-embeddings {most} is below --seq-length {args.seq_length}: remove it, or raise it",
    )


def check_stages(args: Namespace) -> None:
    """One way at most to ask for the stages of a YOCO's pipeline, and a pipeline to cut."""
    ways = (
        "pipeline_model_parallel_layout",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
    )
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    alone = args.pipeline_model_parallel_size == 1
    given = [f"--{dest.replace('_', '-')}" for dest in (*ways, *ends[: 2 * alone]) if getattr(args, dest) is not None]
    require(not (given and alone), f"{' and '.join(given)} needs --pipeline-model-parallel-size above 1")
    require(len(given) <= 1, f"{' and '.join(given)} contradict each other: keep one of them")


def check_optimizer(args: Namespace) -> None:
    """Of every architecture."""
    require(
        not (args.use_precision_aware_optimizer and args.fp8_param_gather),
        "--use-precision-aware-optimizer does not go with --fp8-param-gather: it keeps the bits that bf16 weights "
        "lack, and these are in FP8; use only one of them",
    )
    require(
        not (args.use_distributed_optimizer and args.optimizer == "sgd"),
        "--optimizer sgd does not go with --use-distributed-optimizer, whose state is Adam's: use only one of them",
    )
    check_matrix_optimizer(args)
    require(
        not (args.fp16 and args.bf16),
        "--fp16 does not go with --bf16, which a config may set: use only one of them, and --config OTHER.yaml with "
        "`bf16: false` to undo a config's",
    )
    require(
        not args.fp16 or args.loss_scale is not None or args.min_loss_scale <= args.initial_loss_scale,
        f"--initial-loss-scale {args.initial_loss_scale} is below --min-loss-scale {args.min_loss_scale}: change one",
    )
    require(
        not args.use_precision_aware_optimizer or (args.use_distributed_optimizer and args.optimizer == "adam"),
        "--use-precision-aware-optimizer is built for --optimizer adam with --use-distributed-optimizer: set both, or "
        "remove it",
    )


def check_matrix_optimizer(args: Namespace) -> None:
    """Rules of `MATRIX_OPTIMIZERS`."""
    if args.optimizer not in MATRIX_OPTIMIZERS:
        return
    for flag, asked in (
        ("--fp16", args.fp16),
        ("--fp8-param-gather", args.fp8_param_gather),
        ("--optimizer-cpu-offload", args.optimizer_cpu_offload),
        ("--overlap-param-gather-with-optimizer-step", args.overlap_param_gather_with_optimizer_step),
    ):
        require(not asked, f"{flag} is not built for --optimizer {args.optimizer}: remove one of them")
    require(args.muon_num_ns_steps >= 1, f"--muon-num-ns-steps {args.muon_num_ns_steps} must be at least 1")
    require(
        args.bf16 or not args.use_distributed_optimizer,
        f"--optimizer {args.optimizer} with --use-distributed-optimizer is built for --bf16 alone: set it, or remove "
        "--use-distributed-optimizer",
    )


def check_cuda_graphs(args: Namespace, parser: ArgumentParser) -> None:
    """A YOCO can be captured whole, forward and backward of a step, but not layer by layer."""
    if args.cuda_graph_impl in ("local", "transformer_engine"):
        raise ValueError(
            "--cuda-graph-impl local and transformer_engine record layers whose inputs are tensors; those of "
            "--architecture yoco get the shared K,V as an object that sums their gradients: use full_iteration"
        )
    if args.cuda_graph_impl == "none":
        return
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        flag = "--" + name.replace("_", "-")
        require(
            getattr(args, name) == 1,
            f"--cuda-graph-impl is not built for {flag} {getattr(args, name)}: use only one of them",
        )
    require(
        not args.has_loss_masks,
        f"data with loss masks do not go with --cuda-graph-impl {args.cuda_graph_impl}, as "
        f"{NOT_IN_A_CUDA_GRAPH['loss_suffix']}: remove it",
    )
    flags = {action.dest: action.option_strings[0] for action in parser._actions}
    for dest, why in NOT_IN_A_CUDA_GRAPH.items():
        require(
            getattr(args, dest, parser.get_default(dest)) == parser.get_default(dest),
            f"{flags[dest]} does not go with --cuda-graph-impl {args.cuda_graph_impl}, as {why}: use only one of them",
        )


def check_ignored(args: Namespace, parser: ArgumentParser) -> None:
    """Refuse flags that a YOCO model, or the baseline as it is built here, would read past."""
    for dest in OF_MEGATRONS_LOSS:
        require(
            not (args.loss_chunk_size and getattr(args, dest)),
            f"--{dest.replace('_', '-')} has no effect with --loss-chunk-size, which is another loss: use only one",
        )
    if args.architecture != "yoco":
        check_loss_chunk(args)
    else:
        check_cuda_graphs(args, parser)
        for mixer in mixers_in(args.self_decoder):
            require(
                not args.dataloader_inter_document_masking or mixer.separates_documents is True,
                f"--dataloader-inter-document-masking is not built for --self-decoder {mixer.name}: use only one",
            )
