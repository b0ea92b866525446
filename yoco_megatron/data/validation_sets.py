"""--full-validation and --multiple-validation-sets: all sets as one dataset, read in the order of evaluations.

Megatron's own handling fails: it takes lengths from data loaders, which ranks without data lack, evaluates with batches
of another size than it tells the pipeline, and counts samples twice where ranks do not share them evenly. Here an
evaluation is so many whole batches of each set, the same on all ranks, and Megatron sees an ordinary validation set.
`upstream/validation.py` reports a loss for each set.
"""

import bisect
import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from yoco_megatron.data.blend import read_blends
from yoco_megatron.utils.errors import require


class ValidationSets(torch.utils.data.Dataset):
    """Evaluation after evaluation: `samples[0]` samples of the first set, `samples[1]` of the second, and so on.

    Args:
        sets: one dataset each.
        samples: of each set in one evaluation, whole batches.
        evaluations: how many there are.
        whole: each evaluation reads each set once from its beginning, and what is missing to whole batches is a
            sample without loss; else it goes on where the one before ended, and a set that is at its end begins again.
    """

    index_split = Split.valid  # by which Megatron chooses the batch of evaluation

    def __init__(self, sets: Sequence[GPTDataset], samples: Sequence[int], evaluations: int, whole: bool) -> None:
        self.sets, self.samples, self.evaluations, self.whole = sets, samples, evaluations, whole
        self.ends = list(itertools.accumulate(samples))

    def __len__(self) -> int:
        return self.evaluations * self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        evaluation, place = divmod(int(index), self.ends[-1])
        number = bisect.bisect_right(self.ends, place)
        data, own = self.sets[number], self.samples[number]
        place -= self.ends[number] - own
        if not self.whole:
            return data[(evaluation * own + place) % len(data)]
        if place < len(data):
            return data[place]
        sample = data[0]
        return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


def take_over(args: Namespace) -> None:
    """Keep the two flags under names of our own, in place, where Megatron's code does not see them.

    --eval-iters then counts the batches of the test part, and of each set that is not evaluated whole.
    """
    args.evaluates_test = bool(args.eval_iters)
    args.validates_whole = bool(args.full_validation)
    args.validation_sets = []
    if args.multiple_validation_sets:
        numbers = map(str, range(len(prefixes(args))))
        args.validation_sets = list(args.validation_set_names or numbers)
    if args.validates_whole:
        args.eval_iters = args.eval_iters or 1  # 0 would turn validation off
    args.full_validation = args.multiple_validation_sets = False
    args.validation_set_names = None


def prefixes(args: Namespace) -> list[str | None]:
    """Of the validation sets, in the order of the flags; [None] stands for mock data."""
    if args.mock_data:
        return [None]
    blend, per_part = read_blends(args)
    valid = blend if per_part is None else per_part[Split.valid.value]
    return [] if valid is None else list(valid[0])


def check(args: Namespace) -> None:
    """Refuse, before `take_over`, what names no sets, or more than is used.

    Raises:
        ValueError: names the flag.
    """
    several, names = "--multiple-validation-sets", args.validation_set_names
    require(args.multiple_validation_sets or not names, f"--validation-set-names has no effect without {several}")
    if not (args.full_validation or args.multiple_validation_sets):
        return
    flag = several if args.multiple_validation_sets else "--full-validation"
    require(
        args.dataloader_type in (None, "single"),
        f"{flag} does not go with --dataloader-type {args.dataloader_type}, which shuffles across sets: remove one",
    )
    per_part = None if args.mock_data else read_blends(args)[1]
    valid = None if per_part is None else per_part[Split.valid.value]
    if args.multiple_validation_sets:
        require(
            valid is not None,
            f"{several} needs the sets as prefixes of --valid-data-path, or as those of valid in "
            "--per-split-data-args-path",
        )
        number = len(prefixes(args))
        require(
            not names or len(names) == number == len(set(names)),
            f"--validation-set-names {' '.join(names or [])}: give {number} different names, one for each set of "
            "validation data",
        )
    require(
        valid is None or valid[1] is None,
        f"the weights of validation data have no effect with {flag}: give its prefixes alone",
    )


def build(
    args: Namespace, build_set: Callable[[str | None, int | None], GPTDataset | None], num_samples: int
) -> ValidationSets | None:
    """The sets of a run, None on ranks without data; sets `args.validation_batches`, the batches of each set.

    Args:
        build_set: makes the dataset of a prefix with at least so many samples, None for one epoch.
        num_samples: that Megatron asks for, --eval-iters batches for each evaluation of the run.
    """
    batch = args.eval_global_batch_size
    evaluations = num_samples // (args.eval_iters * batch)
    names = prefixes(args)
    sets = [build_set(prefix, None if args.validates_whole else num_samples) for prefix in names]
    lengths = _of_first_rank([0 if one is None else len(one) for one in sets])
    batches = [math.ceil(length / batch) if args.validates_whole else args.eval_iters for length in lengths]
    is_told = hasattr(args, "validation_batches")  # each chunk of an interleaved pipeline asks
    args.validation_batches = batches
    # A checkpoint may come from a run with other sets: an evaluation starts with the first batch of the first set.
    of_one = sum(batches) * batch
    done = getattr(args, "consumed_valid_samples", 0) // of_one
    args.consumed_valid_samples = done * of_one
    if args.rank == 0 and not is_told:
        for prefix, length, own in zip(names, lengths, batches):
            size = f"all {length:,} samples" if args.validates_whole else f"{own * batch:,} samples"
            print(f"an evaluation reads {size} of {prefix or 'mock data'}, in {own:,} batches of {batch}")
    if any(one is None for one in sets):
        return None
    return ValidationSets(sets, [own * batch for own in batches], done + evaluations, args.validates_whole)


def _of_first_rank(lengths: list[int]) -> list[int]:
    """What the first rank found, which always has data, on all ranks."""
    if not torch.distributed.is_initialized():
        return lengths
    told = [lengths]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
