"""Outputs that are made again in backward instead of kept.

A linear layer keeps its input for its weight's gradient. Where that input is a cheap function of what is kept anyway,
its memory is given back after the layer has run, and filled again when the gradient of the layer's output is there.
Autograd is not involved: the operation that made the input must not need its own output, as SwiGLU does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def remake_in_backward(value: Tensor, reader_output: Tensor, remake: Callable[[Tensor], None]) -> None:
    """Free the memory of `value` until backward needs it.

    Args:
        value: what the reader was given; a whole storage of its own, that nothing but the reader needs.
        reader_output: the reader's output. Its gradient comes right before the reader's backward.
        remake: writes the values into a tensor like `value`, by the same operations, so that they are the same bits.
    """
    storage = value.untyped_storage()
    size = storage.nbytes()
    assert size == value.nbytes, "a view cannot be freed"
    if not reader_output.requires_grad:
        return
    storage.resize_(0)
    held = [(value, remake)]

    def restore(_: Tensor) -> None:
        if not held:  # a second backward of a kept graph
            return
        value, remake = held.pop()
        value.untyped_storage().resize_(size)
        with torch.no_grad():
            remake(value.data)  # .data: autograd must not take it for a change of a saved tensor

    reader_output.register_hook(restore)
