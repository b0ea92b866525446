"""Outputs that are made again in backward instead of kept.

A linear layer keeps its input for its weight's gradient. Where that input is a cheap function of what is kept anyway,
its memory is given back after the layer has run, and filled again when the gradient of the layer's output is there.
Autograd is not involved: the operation that made the input must not need its own output, as SwiGLU does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def check_whole(value: Tensor) -> None:
    """AssertionError for a part of a storage."""
    assert value.untyped_storage().nbytes() == value.nbytes, "a view cannot be freed"


def give_back(value: Tensor) -> None:
    """Free the memory of `value`, a whole storage of its own, until `fill_again`."""
    check_whole(value)
    value.untyped_storage().resize_(0)


def fill_again(value: Tensor, write: Callable[[Tensor], None]) -> None:
    """Give `value` its memory again, and let `write` put the values there."""
    value.untyped_storage().resize_(value.nbytes)
    with torch.no_grad():
        write(value.data)  # .data: autograd must not take it for a change of a saved tensor


def remake_in_backward(value: Tensor, reader_output: Tensor, remake: Callable[[Tensor], None]) -> None:
    """Free the memory of `value` until backward needs it.

    Args:
        value: what the reader was given; a whole storage of its own, that nothing but the reader needs.
        reader_output: the reader's output. Its gradient comes right before the reader's backward.
        remake: writes the values into a tensor like `value`, by the same operations, so that they are the same bits.
    """
    check_whole(value)
    if not reader_output.requires_grad:
        return
    give_back(value)
    held = [(value, remake)]

    def restore(_: Tensor) -> None:
        if not held:  # a second backward of a kept graph
            return
        fill_again(*held.pop())

    reader_output.register_hook(restore)
