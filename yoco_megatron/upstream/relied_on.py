"""Private names, and rules of theirs that ours repeats, in rooms that do not import this one."""

from yoco_megatron.upstream.registry import relies_on

P2P = "megatron.core.pipeline_parallel.p2p_communication"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"
GPT_DATASET = "megatron.core.datasets.gpt_dataset"
LAYERS = "megatron.core.tensor_parallel.layers"

relies_on(
    P2P,
    "P2PCommunicator._communicate_shapes",
    digest="aacff087a3de7e60",
    used_by="parallel/pipeline/communicator.py",
    why="overridden: it is asked once for each exchange, and only with variable_seq_lengths",
)
relies_on(
    P2P,
    "P2PCommunicator._communicate",
    digest="86a4daad959d42b6",
    used_by="parallel/pipeline/communicator.py",
    why="it takes the shapes to receive from _communicate_shapes, previous stage first",
)
relies_on(
    SCHEDULES,
    "get_schedule_table",
    digest="d13139f549846699",
    used_by="parallel/pipeline/communicator.py",
    why="the order in which the interleaved schedule runs its model chunks",
)
relies_on(
    SCHEDULES,
    "forward_backward_pipelining_with_interleaving",
    digest="6772d65b9d445527",
    used_by="parallel/pipeline/communicator.py",
    why="which receives it makes, in which order",
)
relies_on(
    SCHEDULES,
    "forward_backward_pipelining_without_interleaving",
    digest="fef344ee2f907ec8",
    used_by="parallel/pipeline/communicator.py",
    why="which receives it makes, in which order",
)
relies_on(
    "megatron.core.recompute",
    "checkpointed_forward",
    digest="eb7183da3aeb8cde",
    used_by="model/yoco_block.py",
    why="called with a stand-in that has what it reads of a TransformerBlock",
)
relies_on(
    LAYERS,
    "VocabParallelEmbedding.forward",
    digest="b4307700452300a5",
    used_by="model/layers/embedding.py",
    why="overridden: on one rank, without deterministic mode, it is F.embedding",
)
relies_on(
    LAYERS,
    "ColumnParallelLinear.forward",
    digest="9da4bdadf36a51df",
    used_by="model/layers/output_layer.py",
    why="overridden where there are labels: how it copies or gathers its input",
)
relies_on(
    "megatron.core.distributed.distributed_data_parallel",
    "DistributedDataParallel._make_backward_post_hook",
    digest="5fd4c5923093b5f2",
    used_by="model/layers/main_grad.py",
    why="with `grad_added_to_main_grad` it ignores autograd's gradient of a parameter",
)
relies_on(
    "megatron.core.models.gpt.gpt_model",
    "GPTModel._postprocess",
    digest="45150e7ea28dcb6a",
    used_by="model/builder.py",
    why="what it calls `output_processor` with, and that it does nothing to the loss that this returns",
)
relies_on(
    "transformer_engine.pytorch.module.base",
    "TransformerEngineBaseModule.reset_parameters",
    digest=None,  # tests/gpu/test_training.py
    used_by="model/init.py",
    why="an FP8 parameter has its unrounded initial value as `_high_precision_init_val`",
)
relies_on(
    GPT_DATASET,
    "GPTDataset.__getitem__",
    digest="bf99513ea441cc12",
    used_by="data/dataset.py",
    why="overridden: cu_seqlens and loss_mask of a sample, and what it keeps of the first one",
)
relies_on(
    GPT_DATASET,
    "GPTDataset._query_document_sample_shuffle_indices",
    digest="f2654a6b3ac7e476",
    used_by="data/dataset.py",
    why="overridden: every id of a sample is in what it returns, before the padding is replaced; packed documents are "
    "read there, and how a stream is cut is repeated for its loss mask",
)
relies_on(
    "megatron.core.datasets.megatron_dataset",
    "MegatronDataset.__init__",
    digest="8013012fcfc8373a",
    used_by="data/dataset.py",
    why="dataset_path is a part of the names of caches, and nothing else",
)
relies_on(
    "megatron.core.datasets.megatron_dataset",
    "MegatronDataset._key_config_attributes",
    digest="d52a70b36331ed54",
    used_by="data/dataset.py",
    why="overridden: which flags decide the indices",
)
relies_on(
    GPT_DATASET,
    "GPTDataset._build_document_sample_shuffle_indices",
    digest="ac9659147421227d",
    used_by="data/plan.py",
    why="its rule of the last epoch is repeated there; data/dataset.py reads the indices that it makes, and has others "
    "for packed documents",
)
relies_on(
    GPT_DATASET,
    "GPTDataset._get_num_epochs",
    digest="b0284dc57e16152e",
    used_by="data/plan.py",
    why="its count of epochs is computed there without building an index",
)
relies_on(
    "megatron.training.arguments",
    "add_megatron_arguments",
    digest=None,  # tests/upstream/test_core_fixes.py: its help text still fails
    used_by="startup/parser.py",
    why="a lone % in one help text makes --help fail: escaped there; read parser._actions and _option_string_actions",
)
relies_on(
    "torch",
    "ops.aten._flash_attention_forward",
    digest=None,  # native; tests/gpu/test_inference.py
    used_by="inference/cache.py",
    why="its arguments, and the log-sum-exp among its results",
)
relies_on(
    "megatron.core.optimizer.optimizer",
    "param_group_identifier_keys",
    digest=None,  # a tuple
    used_by="upstream/resumed_learning_rates.py",
    why="a checkpoint's parameter groups are found by their learning rates, among other things",
)
relies_on(
    "torch",
    "ops.aten._scaled_dot_product_cudnn_attention",
    digest=None,  # native, as its backward and the flash ones; tests/gpu/test_context_parallel.py
    used_by="ops/attention/partial.py",
    why="its arguments, and the log-sum-exp and random state among its results",
)
relies_on(
    "megatron.core.optimizer_param_scheduler",
    "OptimizerParamScheduler.load_state_dict",
    digest="40a354ce90a48fdd",
    used_by="startup/resume_schedule.py",
    why="which of its values must agree with the checkpoint's, and how it counts lengths: compared before the start",
)
relies_on(
    "torch.distributed.checkpoint.default_planner",
    "DefaultSavePlanner.resolve_data",
    digest="7cfc7303c2abfcb0",
    used_by="convert/writers.py",
    why="overridden: it is asked for each tensor right before its bytes are written",
)
relies_on(
    "torch.distributed.checkpoint.filesystem",
    "FileSystemReader.read_metadata",
    digest="03bb3f8561a7c4b4",
    used_by="convert/readers.py",
    why="overridden: read once, not for each tensor",
)
relies_on(
    "megatron.core.fusions.fused_bias_swiglu",
    "swiglu_back",
    digest="1a1d88f6fa2355db",
    used_by="dry_run/gpu.py",
    why="compiled: one kernel, which allocates its result alone",
)
relies_on(
    "megatron.core.fusions.fused_bias_swiglu",
    "weighted_swiglu_back",
    digest="7724caff86622559",
    used_by="dry_run/balanced_experts.py",
    why="compiled: one kernel, which allocates its results alone",
)
relies_on(
    "megatron.core.transformer.moe.token_dispatcher",
    "MoEAlltoAllTokenDispatcher.preprocess",
    digest="d11096c6fec7ad9a",
    used_by="dry_run/balanced_experts.py",
    why="replaced in a dry run: what it exchanges, and the splits that it takes from the router's numbers",
)
relies_on(
    "megatron.core.transformer.moe.token_dispatcher",
    "MoEAllGatherTokenDispatcher.dispatch_postprocess",
    digest="b63ad619612b585f",
    used_by="dry_run/balanced_experts.py",
    why="written again in a dry run: it selects as many rows as the router's numbers say",
)
relies_on(
    "megatron.core.fusions.fused_bias_swiglu",
    "swiglu",
    digest="fed0b5e375c3355e",
    used_by="dry_run/gpu.py",
    why="compiled: one kernel, which allocates its result alone",
)
relies_on(
    "megatron.core.fusions.fused_bias_swiglu",
    "weighted_swiglu",
    digest="4b4690b7a5874c4b",
    used_by="dry_run/balanced_experts.py",
    why="compiled: one kernel, which allocates its result alone",
)
relies_on(
    "megatron.core.optimizer",
    "_get_megatron_optimizer_based_on_param_groups",
    digest="8ef99e8043fdfc15",
    used_by="dry_run/fused_adam.py",
    why="arguments of Transformer Engine's FusedAdam, and which of its states are made before the first step",
)
relies_on(
    "megatron.core.optimizer.distrib_optimizer",
    "DistributedOptimizer.state_dict",
    digest="b689e6bd27484901",
    used_by="dry_run/gpu.py",
    why="where it reads the number of steps of Transformer Engine's optimizer",
)
relies_on(
    "megatron.core.optimizer.distrib_optimizer",
    "DistributedOptimizer._get_main_param_and_optimizer_states",
    digest="0fd32fc857d72b8b",
    used_by="dry_run/fused_adam.py",
    why="what it asks the precision-aware optimizer for",
)
relies_on(
    "megatron.core.optimizer.optimizer_config",
    "OptimizerConfig.__post_init__",
    digest="f79312b197d52c1b",
    used_by="dry_run/gpu.py",
    why="it asks Transformer Engine's FusedAdam for its arguments",
)
relies_on(
    "megatron.core.models.gpt.gpt_layer_specs",
    "get_gpt_layer_with_transformer_engine_submodules",
    digest="68b00879b753bc38",
    used_by="dry_run/gpu.py",
    why="the Transformer's layer that a dry run's is like",
)
relies_on(
    "megatron.core.extensions.transformer_engine",
    "te_checkpoint",
    digest="5699afb8b0040cfd",
    used_by="dry_run/gpu.py",
    why="its arguments; in a dry run FP8's checkpoint is Megatron's own",
)
relies_on(
    "megatron.core.extensions.transformer_engine",
    "set_save_original_input",
    digest="b6fff90bfd7daf7d",
    used_by="dry_run/gpu_layers.py",
    why="the attribute that keeps a linear layer's input as it is",
)
relies_on(
    "megatron.core.transformer.module",
    "MegatronModule.set_is_first_microbatch",
    digest="ffc90ab4441087c4",
    used_by="dry_run/gpu_layers.py",
    why="weights in FP8 are made once a step and kept",
)
relies_on(
    "megatron.core.models.common.embeddings.rope_utils",
    "apply_rotary_pos_emb",
    digest="0702d982220d98c6",
    used_by="dry_run/gpu.py",
    why="it calls Transformer Engine's kernel by the name that a dry run replaces",
)
relies_on(
    "megatron.core.timers",
    "Timers._get_global_min_max_time",
    digest="e4c8c299d369f51c",
    used_by="dry_run/fake_rank.py",
    why="replaced in a dry run: it makes a list of a tensor, one number of each rank",
)
relies_on(
    "megatron.core.optimizer.clip_grads",
    "get_grad_norm_fp32",
    digest="1c134ce01399b2cb",
    used_by="dry_run/fake_rank.py",
    why="it calls l2_norm_impl, which a dry run replaces, as that reads numbers of tensors",
)
relies_on(
    "megatron.core.optimizer.optimizer",
    "ChainedOptimizer.sharded_state_dict",
    digest="8796f901f970a050",
    used_by="dry_run/fake_rank.py",
    why="the optimizer's part of a checkpoint, made as a save makes it",
)
relies_on(
    "megatron.training.checkpointing",
    "_build_sharded_state_dict_metadata",
    digest="b6776c4f22aadaf9",
    used_by="dry_run/fake_rank.py",
    why="how a save asks for the shards of a checkpoint",
)
relies_on(
    "megatron.training.checkpointing",
    "generate_state_dict",
    digest="f0965f326acfe21e",
    used_by="dry_run/fake_rank.py",
    why="how a save asks for the shards of a checkpoint",
)
relies_on(
    "torch.nn",
    "Module._apply",
    digest="0dcd0a85fd8e54d3",
    used_by="dry_run/fake_rank.py",
    why="replaced in a dry run: it swaps fake parameters that something refers to weakly",
)
