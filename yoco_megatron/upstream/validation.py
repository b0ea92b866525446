"""A loss for each validation set, and over each set as a whole: see `data/validation_sets.py`."""

from typing import Any
from unittest import mock

from megatron.training import get_args

from yoco_megatron.upstream.registry import replaces

TRAINING = "megatron.training.training"
ON_TEST = "on test set"


@replaces(
    TRAINING,
    "evaluate_and_print_results",
    digest="eb9010f68ad3ae86",
    calls=3,
    when=lambda args: args.validates_whole or args.validation_sets,
    why="its own --full-validation and --multiple-validation-sets fail (data/validation_sets.py); it is called for one "
    "set after the other, as if that were the only one",
)
def evaluate_and_print_results(
    prefix: str, forward_step_func: Any, data_iterator: Any, *rest: Any, **named: Any
) -> None:
    """Megatron's, which prints and writes a loss, for each set; the test part as ever."""
    args, original = get_args(), evaluate_and_print_results.original
    if prefix.endswith(ON_TEST):
        original(prefix, forward_step_func, data_iterator, *rest, **named)
        return
    if not args.validation_sets:
        with mock.patch.multiple(args, eval_iters=sum(args.validation_batches)):
            original(prefix, forward_step_func, data_iterator, *rest, **named)
        return
    for name, batches in zip(args.validation_sets, args.validation_batches):
        only: dict[str, Any] = dict(multiple_validation_sets=True, validation_set_names=[name], eval_iters=[batches])
        with mock.patch.multiple(args, **only):
            original(prefix, forward_step_func, [data_iterator], *rest, **named)
