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
