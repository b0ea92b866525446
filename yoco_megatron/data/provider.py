"""The datasets of a run: Megatron's GPTDataset over .bin/.idx files, blended as Megatron's flags say."""

from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase
from torch.utils.data import ConcatDataset, Dataset

from yoco_megatron.config.loss_suffix import suffix_length
from yoco_megatron.config.resolve import queries_vary
from yoco_megatron.data import validation_sets
from yoco_megatron.data.blend import read_blends
from yoco_megatron.data.content import index_hashes
from yoco_megatron.data.dataset import (
    MAX_ID,
    CheckedGPTDataset,
    CheckedMockDataset,
    DatasetConfig,
)
from yoco_megatron.data.loss_masks import all_prefixes, masked_prefixes
from yoco_megatron.data.plan import train_samples
from yoco_megatron.data.tokenizer import check_flags, id_limit


def dataset_config(args: Namespace, tokenizer: MegatronTokenizerBase, index_sha256: dict[str, str]) -> DatasetConfig:
    """DatasetConfig from Megatron's flags. No attention mask is made: YOCO is causal everywhere.

    index_sha256: see `DatasetConfig`.
    """
    blend, blend_per_split = (None, None) if args.mock_data else read_blends(args)
    return DatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        inter_document_masking=args.dataloader_inter_document_masking,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        # The model has rows for so many; None before Megatron has set it.
        id_limit=min(id_limit(tokenizer), args.padded_vocab_size or MAX_ID),
        index_sha256=index_sha256,
        masked=masked_prefixes(args),
        sample_packing=args.sample_packing,
        loss_suffix=suffix_length(args.loss_suffix, args.seq_length),
    )


def _is_built_here(every_stage: bool) -> bool:
    """Whether this rank reads data: tensor-parallel rank 0, which broadcasts. Middle stages need its masks."""
    ends = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
    return (ends or every_stage) and mpu.get_tensor_model_parallel_rank() == 0


def build_datasets(
    args: Namespace, tokenizer: MegatronTokenizerBase, num_samples: Sequence[int]
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """(train, validation, test), each None where nothing of it is to be read or this rank reads no data.

    Args:
        num_samples: how many samples each must yield at least.
    Raises:
        ValueError: this machine's copy of the data is not that of rank 0.
    """
    every_stage = args.dataloader_inter_document_masking or queries_vary(args)
    train, valid, test = _build(args, tokenizer, num_samples, partial(_is_built_here, every_stage))
    # A finished run that is started again trains nothing, but Megatron's sampler asserts that a sample is left, and a
    # blend has just as many as the run needs.
    if train is not None and args.consumed_train_samples >= max(len(train), train_samples(args)):
        train = ConcatDataset([train, train])
    return train, valid, test


def _build(
    args: Namespace, tokenizer: MegatronTokenizerBase, num_samples: Sequence[int], is_built_here: Callable[[], bool]
) -> tuple[Any, Any, Any]:
    kind = CheckedMockDataset if args.mock_data else CheckedGPTDataset
    new_config = partial(dataset_config, args, tokenizer, index_hashes(all_prefixes(args), is_built_here()))

    def build(config: DatasetConfig, sizes: Sequence[int | None], parts: Collection[Split]) -> list[Any]:
        for part in set(Split) - set(parts):  # of which Megatron would build one epoch, or a blend of length 0
            for sources in (config.split_matrix, config.blend_per_split):
                if sources is not None:
                    sources[part.value] = None
        return BlendedMegatronDatasetBuilder(kind, list(sizes), is_built_here, config).build()

    def build_set(prefix: str | None, samples: int | None) -> CheckedGPTDataset | None:
        config = new_config()
        if config.blend is not None:
            config.blend = [prefix], None
        elif config.blend_per_split is not None:
            config.blend_per_split[Split.valid.value] = [prefix], None
        return build(config, [0, samples, 0], [Split.valid])[Split.valid.value]

    # The last evaluation comes in any case, also before --start-eval-at-iter.
    num_samples = list(num_samples)
    num_samples[Split.valid.value] = max(num_samples[Split.valid.value], args.eval_iters * args.eval_global_batch_size)
    has_sets = args.validates_whole or args.validation_sets
    wanted = [part for part in Split if num_samples[part.value] and not (has_sets and part is Split.valid)]
    if not args.evaluates_test:
        wanted = [part for part in wanted if part is not Split.test]
    train, valid, test = build(new_config(), num_samples, wanted)
    if has_sets:
        valid = validation_sets.build(args, build_set, num_samples[Split.valid.value])
    return train, valid, test


def prepare_cache(args: Namespace) -> dict[str, int]:
    """Build and write the indices that training with `args` will look for, in one process without process groups.

    Returns:
        samples of train, valid and test, of those that there are.
    Raises:
        ValueError: no --data-cache-path, no tokenizer, or no data to index.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.global_vars import set_args
    from megatron.training.training import get_train_valid_test_num_samples

    if args.data_cache_path is None:
        raise ValueError("--data-cache-path is missing: name the folder, the same as in training")
    if args.mock_data:
        raise ValueError("--mock-data needs no cache")
    check_flags(args)
    if args.step_batch_size_schedule is not None:
        raise ValueError("--step-batch-size-schedule: the number of evaluations is known in training only")
    # What Megatron fills in when training starts.
    args.train_iters = args.train_iters or train_samples(args) // args.global_batch_size
    args.eval_global_batch_size = args.eval_global_batch_size or args.global_batch_size
    set_args(args)
    try:
        sizes = get_train_valid_test_num_samples()
    finally:
        set_args(None)
    datasets = _build(args, build_tokenizer(args), sizes, lambda: True)
    return {name: len(part) for name, part in zip(("train", "valid", "test"), datasets) if part is not None}
