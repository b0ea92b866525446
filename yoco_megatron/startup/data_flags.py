"""The data that the flags name: found, whole, and enough for what the run does with them."""

import math
from argparse import Namespace

from yoco_megatron.data import validation_sets
from yoco_megatron.data.blend import DATA_FLAGS, PARTS, flag_of, read_blends, shares
from yoco_megatron.data.check import check_data_prefixes, check_split, data_prefixes_from_args
from yoco_megatron.data.loss_masks import check_masks, has_mask, learned_behind
from yoco_megatron.data.packing import is_packed
from yoco_megatron.data.plan import epoch_of, plan, train_samples
from yoco_megatron.utils.errors import require

MISSING = "--data-path is missing: name a prefix of .bin/.idx files, or use --mock-data"


def check_named(args: Namespace) -> None:
    """Of every command that reads flags of a run.

    Raises:
        ValueError: flags that contradict each other, data that are missing or damaged.
    """
    for dest in ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"):
        require(
            not getattr(args, dest) or args.data_cache_path is not None,
            f"{flag_of(dest)} reads what tools/prepare_cache.py wrote: name its --data-cache-path",
        )
    if args.mock_data:
        named = [flag_of(dest) for dest in DATA_FLAGS if getattr(args, dest)]
        require(not named, f"{' and '.join(named)} and --mock-data contradict each other: keep one of them")
        return
    prefixes = data_prefixes_from_args(args)
    require(bool(prefixes) or args.skip_train, MISSING)
    stored = [prefix for prefix in prefixes if "://" in prefix]
    require(
        not stored,
        f"the data {' '.join(stored)} are checked before the start, which object storage does not allow: copy them to "
        "a file system",
    )
    check_data_prefixes(prefixes, inside=args.rank == 0)
    check_masks(prefixes, inside=args.rank == 0)
    require(
        not args.dataloader_fast_cache_load or args.split is None,
        f"--dataloader-fast-cache-load does not go with --split {args.split}: give each part data of its own "
        "(--train-data-path, --valid-data-path, --test-data-path)",
    )
    if prefixes and args.split is not None:
        check_split(prefixes, args.split)


def check_enough(args: Namespace) -> None:
    """What is trained on and evaluated on must be there: Megatron finds out once the model is built.

    Raises:
        ValueError: a part of the data that the run reads, and that is empty or too short.
    """
    require(args.mock_data or bool(data_prefixes_from_args(args)), MISSING)
    blend, per_part = (None, None) if args.mock_data else read_blends(args)
    if per_part is None:
        split = args.split or "1,1,1"  # Megatron's for mock data
        present = {part: share > 0 for part, share in zip(PARTS, shares(split))}
        where = f"--split {split} leaves"
    else:
        present = {part: one is not None for part, one in zip(PARTS, per_part)}
        where = "the data flags of single parts leave"
    require(
        present["train"] or args.skip_train,
        f"{where} nothing to train on: give the first part, train, a share or data of its own",
    )
    require(
        present["valid"] or args.eval_iters == 0,
        f"{where} nothing to evaluate on: give the second part, valid, a share or data of its own, or --eval-iters 0",
    )
    if args.validates_whole and not args.mock_data:
        for prefix in validation_sets.prefixes(args):
            held = epoch_of(args, str(prefix), args.split, "valid" if args.split else None)
            require(
                held.samples > 0,
                f"--full-validation: the validation data of {prefix} are {held.tokens:,} tokens, less than one sample "
                f"of --seq-length {args.seq_length}",
            )
    _check_read_once(args, blend or (per_part[0] if per_part else None))


def packing(args: Namespace) -> list[str]:
    """What to say of packed documents: how well they fill the samples of each part, and which are cut."""
    blend, per_part = (None, None) if args.mock_data else read_blends(args)
    is_read = (not args.skip_train, bool(args.eval_iters), args.evaluates_test)
    notes = []
    for part, own, reads in zip(PARTS, per_part or [blend] * len(PARTS), is_read):
        for prefix in dict.fromkeys(own[0]) if own is not None and reads else []:
            if not is_packed(args.sample_packing, has_mask(prefix)):
                continue
            held = epoch_of(args, prefix, args.split, part if args.split else None)
            if not held.samples:
                continue
            name = f"{prefix}, {part}"
            notes.append(
                f"{name}: {held.documents:,} whole documents in {held.samples:,} samples an epoch, "
                f"{held.padding:.2%} padding"
            )
            longer = len(held.longer)
            if longer:
                unlearned = learned_behind(prefix, held.longer, args.seq_length) if has_mask(prefix) else 0
                notes.append(
                    f"WARNING: {name}: {longer:,} documents ({longer / held.documents:.2%}) are longer than "
                    f"--seq-length {args.seq_length}: their tokens behind it, {held.cut / held.tokens:.2%} of all, are "
                    f"left out{f', and with them all that is learned of {unlearned:,} documents' if unlearned else ''}"
                )
    if notes and args.architecture == "yoco":
        notes.append("--dataloader-inter-document-masking is on: packed documents do not attend to each other")
    elif notes:
        notes.append("WARNING: the baseline has no document masks: packed documents see those before them")
    return notes


def repeated_validation(args: Namespace) -> list[str]:
    """What to say where one evaluation reads samples several times: Megatron begins a short part again in silence.

    Args:
        args: Megatron's validated arguments.
    """
    if args.mock_data or args.validates_whole or not args.eval_iters or args.skip_train:
        return []
    blend, per_part = read_blends(args)
    part = blend or (per_part[1] if per_part else None)
    if part is None:
        return []
    prefixes, weights = part
    of_split = "valid" if args.split else None
    held = [epoch_of(args, prefix, args.split, of_split).samples for prefix in prefixes]
    batch = args.eval_global_batch_size or args.global_batch_size
    wanted = [
        args.eval_iters * batch * share
        for share in ([1.0] if weights is None else [weight / sum(weights) for weight in weights])
    ]
    if args.validation_sets:
        wanted *= len(prefixes)
    elif weights is None:  # read in proportion to their sizes
        prefixes, held = [" ".join(prefixes)], [sum(held)]
    return [
        f"an evaluation of --eval-iters {args.eval_iters} reads {math.ceil(samples):,} samples of {prefix}, whose part "
        f"valid holds {own:,}: some are read several times; --full-validation reads each once"
        for prefix, own, samples in zip(prefixes, held, wanted)
        if samples > own
    ]


def _check_read_once(args: Namespace, blend: tuple[list[str], list[float] | None] | None) -> None:
    """Several datasets without weights are read once: with them, the run ends."""
    if args.skip_train or blend is None or blend[1] is not None or len(blend[0]) == 1:
        return
    try:
        wanted = train_samples(args)
    except ValueError:  # the batch follows from the number of processes
        return
    samples = sum(source.samples for source in plan(args, wanted))
    require(
        samples >= wanted,
        f"several datasets without weights are read once: they hold {samples:,} samples, and the run needs "
        f"{wanted:,}. Give weights (W1 P1 W2 P2 ...), or train less",
    )
