"""The order in which evaluations read several sets, or whole ones."""

from argparse import Namespace

import pytest
import torch

from yoco_megatron.data import validation_sets
from yoco_megatron.data.blend import DATA_FLAGS
from yoco_megatron.data.validation_sets import ValidationSets


class Numbered(list):
    """A dataset whose samples are told apart by their token."""

    def __getitem__(self, index):
        return {"tokens": torch.tensor(super().__getitem__(index)), "loss_mask": torch.ones(3)}


SETS = [Numbered(range(5)), Numbered(range(10, 13))]


def read(data: ValidationSets, evaluation: int) -> list[tuple[int, float]]:
    """(token, sum of the loss mask) of each sample of an evaluation."""
    size = len(data) // data.evaluations
    samples = [data[evaluation * size + place] for place in range(size)]
    return [(int(sample["tokens"]), float(sample["loss_mask"].sum())) for sample in samples]


def test_whole_sets_are_read_once_in_each_evaluation():
    data = ValidationSets(SETS, [8, 4], evaluations=2, whole=True)
    for evaluation in range(2):
        samples = read(data, evaluation)
        with_loss = [token for token, mask in samples if mask]
        assert with_loss == [0, 1, 2, 3, 4, 10, 11, 12]
        assert len(samples) == 12 and all(mask in (0, 3) for _, mask in samples)


def test_parts_of_sets_follow_each_other_and_begin_again():
    data = ValidationSets(SETS, [2, 2], evaluations=3, whole=False)
    tokens = [[token for token, _ in read(data, evaluation)] for evaluation in range(3)]
    assert tokens == [[0, 1, 10, 11], [2, 3, 12, 10], [4, 0, 11, 12]]


def arguments(**given: object) -> Namespace:
    flags = dict(
        full_validation=False, multiple_validation_sets=False, validation_set_names=None, dataloader_type=None,
        mock_data=False, split=None, eval_iters=3, eval_global_batch_size=4, rank=1, consumed_valid_samples=0,
    )  # fmt: skip
    return Namespace(**(dict.fromkeys(DATA_FLAGS) | flags | given))


def test_a_resumed_run_starts_with_the_first_set():
    """Whatever the run before had evaluated."""
    args = arguments(valid_data_path=["a", "b", "c"], multiple_validation_sets=True, consumed_valid_samples=75)
    validation_sets.take_over(args)
    data = validation_sets.build(args, lambda prefix, samples: Numbered(range(samples)), num_samples=2 * 3 * 4)
    assert args.consumed_valid_samples == 72, "two evaluations of three sets, 12 samples each"
    assert len(data) == 4 * 36 and args.validation_batches == [3, 3, 3]
    assert args.validation_sets == ["0", "1", "2"] and not args.multiple_validation_sets


@pytest.mark.parametrize(("given", "samples", "batches"), [(3, None, [3]), (0, None, [3])])
def test_whole_sets_are_built_and_counted_whole(given, samples, batches):
    args = arguments(valid_data_path=["a"], full_validation=True, eval_iters=given)
    validation_sets.take_over(args)
    asked = []
    validation_sets.build(args, lambda prefix, samples: asked.append(samples) or Numbered(range(9)), num_samples=24)
    assert asked == [samples] and args.validation_batches == batches
    assert args.eval_iters == (given or 1) and args.evaluates_test == bool(given)


WHOLE, SEVERAL = {"full_validation": True}, {"multiple_validation_sets": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_set_names": ["a"]}, "--validation-set-names has no effect without --multiple-validation-sets"),
        (WHOLE | {"dataloader_type": "cyclic"}, "--full-validation does not go with --dataloader-type cyclic"),
        (SEVERAL | {"mock_data": True}, "--multiple-validation-sets needs the sets as prefixes of --valid-data-path"),
        (SEVERAL | {"data_path": ["a", "b"], "split": "9,1,0"}, "needs the sets as prefixes of --valid-data-path"),
        (SEVERAL | {"valid_data_path": ["1", "a", "2", "b"]}, "weights of validation data have no effect"),
        (WHOLE | {"valid_data_path": ["1", "a", "2", "b"]}, "weights of validation data have no effect"),
        (SEVERAL | {"valid_data_path": ["a", "b", "c"], "validation_set_names": ["x"]}, "give 3 different names"),
        (SEVERAL | {"valid_data_path": ["a", "b"], "validation_set_names": ["x", "x"]}, "give 2 different names"),
    ],
)
def test_what_names_no_sets_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        validation_sets.check(arguments(**flags))
