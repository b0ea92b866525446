"""Steps that fill in what the flags leave open, each in place on parsed arguments."""

from argparse import Namespace

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from yoco_megatron.config import experts
from yoco_megatron.config.resolve import resolve_loss_chunk
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.data import loss_masks, validation_sets
from yoco_megatron.data.plan import DEFAULT_SPLIT
from yoco_megatron.data.tokenizer import check_flags as check_tokenizer_flags
from yoco_megatron.data.tokenizer import check_vocabulary, use_files_of_gpt2
from yoco_megatron.parallel.pipeline.layout import check_micro_batches, plan_stages, set_layout

# Of iterations: beyond the end of any run.
NEVER = 2**31


def fill_in_defaults(args: Namespace) -> None:
    """Values that follow from other flags alone."""
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if not args.pad_vocab_size:  # Megatron would leave the size open, and its own count of FLOPs asks for it
        args.pad_vocab_size, args.make_vocab_size_divisible_by = True, 1
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron saves synchronously
    if args.split is None and (args.data_path is not None or args.data_args_path is not None):
        args.split = DEFAULT_SPLIT  # Megatron has it for the first of them alone
    use_files_of_gpt2(args)
    loss_masks.resolve(args)
    validation_sets.take_over(args)
    if args.skip_train:
        args.tensorboard_dir = None  # its losses are no points of the training's curves
        if not args.train_samples:
            args.train_iters = args.train_iters or 1  # Megatron counts with it
    resolve_loss_chunk(args)


def fill_in_padded_vocab_size(args: Namespace) -> None:
    """Build the tokenizer, if need be: Megatron derives `args.padded_vocab_size` from it.

    Raises:
        ValueError: flags that name none.
    """
    if args.padded_vocab_size is None:
        check_tokenizer_flags(args)
        check_vocabulary(build_tokenizer(args), args)


def choose_pipeline_layout(args: Namespace) -> None:
    """Cut a YOCO into pipeline stages, as the flags say or, where they say nothing, as the planner does.

    Raises:
        ValueError: flags that contradict each other, or a batch that the stages cannot share.
    """
    if args.architecture != "yoco":
        return
    if args.pipeline_model_parallel_size > 1:
        fill_in_padded_vocab_size(args)  # the head's cost decides where the planner cuts
    plan = plan_stages(args, ModelShape.from_args(args))
    if plan is not None:
        check_micro_batches(args, plan.count)
        set_layout(args, plan)


def fill_in_save_interval(args: Namespace) -> None:
    """--save without an interval: the last step is saved, and what --exit-* asks for."""
    if args.save is None and args.save_interval is not None and args.rank == 0:
        print("WARNING: --save-interval without --save or --run-folder: nothing is saved")
    if args.save is None or args.save_interval is not None:
        return
    args.save_interval = args.train_iters or NEVER
    if args.rank == 0:
        print("--save-interval is missing: the run saves at its end alone, and loses all work if it fails before")


def warn_of_unbalanced_experts(args: Namespace) -> None:
    """Megatron's coefficient is 0 by default, and a model that was exported has none."""
    if args.num_experts and not experts.are_balanced(args) and args.rank == 0:
        print(
            "WARNING: nothing balances the experts: set --moe-router-load-balancing-type and --moe-aux-loss-coeff, or "
            "--moe-router-enable-expert-bias"
        )


def list_balancing_losses(args: Namespace) -> None:
    """Where Megatron has one name of a loss for experts it looks for others inside it, and logs zeros of `aux_loss`
    beside `seq_aux_loss`."""
    if args.num_experts and isinstance(args.moe_router_load_balancing_type, str):
        args.moe_router_load_balancing_type = [args.moe_router_load_balancing_type]
        args.moe_aux_loss_coeff = [args.moe_aux_loss_coeff]


def reduce_host_overhead(args: Namespace) -> None:
    """Turn off features that cost host time without helping the GPU. What Megatron would refuse is left to it."""
    # Without another rank of data parallelism there is nothing to overlap, but the hooks for it still cost half a
    # millisecond for every bucket.
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size == model and args.use_distributed_optimizer and not args.use_megatron_fsdp:
        args.overlap_grad_reduce = args.overlap_param_gather = args.overlap_param_gather_with_optimizer_step = False
    # Fused bias, dropout and addition are, without the first two, one addition behind torch.compile's guards.
    if not args.add_bias_linear and not args.hidden_dropout:
        args.bias_dropout_fusion = False
    # In 1F1B the host waits for the GPU at each exchange, for a PyTorch that might free what is being sent. Today's
    # keeps it until the stream has waited, and a host that does not wait has the next stage's work ready.
    args.batch_p2p_sync = False
