"""A step whose loss is NaN or Inf, in a run that saves nothing."""

from typing import Any

from megatron.training import get_args

from yoco_megatron.upstream.registry import replaces


@replaces(
    "megatron.training.training",
    "save_checkpoint_and_time",
    digest="0b0810e17195d9a2",
    when=lambda args: args.save is None,
    why="the rerun state machine has it called before it ends a run, whether or not there is a folder to save into",
)
def save_nowhere(iteration: int, *args: Any, **kwargs: Any) -> None:
    """Say why the run ends: the step would be made again on other hardware, from a checkpoint."""
    if get_args().rank == 0:
        print(
            f"pretrain_yoco.py: error: the loss or gradient of iteration {iteration + 1} is not a finite number: lower "
            "--lr, or look at the data; with --save the step would be made again on other hardware",
            flush=True,
        )
