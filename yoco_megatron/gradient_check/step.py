"""The trainer's first step in this process, one rank of a world, and the whole gradients after it."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
from megatron.core.utils import unwrap_model
from megatron.training import training

from yoco_megatron.gradient_check.whole import gather_whole, reduced_gradient, with_all_experts
from yoco_megatron.model.init import named_parameters
from yoco_megatron.startup import checks

Main = Callable[[list[str]], None]


class _Finished(BaseException):
    """The step is done. No Exception, so that nothing on the way out takes it for a crash of training."""


def _random_document(dataset: MockGPTLowLevelDataset, index: int) -> np.ndarray:
    """Tokens of a mock document. Megatron's own counts up from 1."""
    length = int(dataset.sequence_lengths[index])
    tokens = np.random.default_rng(index).integers(dataset.vocab_size, size=length)
    tokens[-1] = dataset.eod_token
    return tokens


def gradients_of_first_step(main: Main, argv: list[str]) -> dict[str, torch.Tensor]:
    """Run `main(argv)`, pretrain_yoco.py's, for one step, as the rank that the environment says.

    Returns:
        fp32, whole, by the global names of what this rank and its peers of expert parallelism hold, in the order of the
        forward pass; "loss" [] on the last pipeline stage.
    Raises:
        ValueError: a mistake in `argv`.
    """
    set_up, step = training.setup_model_and_optimizer, training.train_step
    built: list[Any] = []
    found: dict[str, torch.Tensor] = {}

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        result = set_up(*args, **kwargs)
        built[:] = result[0]
        return result

    def train_step(*args: Any, **kwargs: Any) -> None:
        losses = step(*args, **kwargs)[0]
        if "lm loss" in losses:
            found["loss"] = losses["lm loss"].detach().float().cpu().reshape(())
        for chunk in built:
            for name, parameter in named_parameters(unwrap_model(chunk)):
                if parameter.requires_grad:
                    found[name] = gather_whole(name, reduced_gradient(parameter, chunk), parameter).float().cpu()
        raise _Finished

    def check_machine(args: Namespace) -> None:
        """Not this one is meant."""

    with (
        mock.patch.multiple(training, setup_model_and_optimizer=setup_model_and_optimizer, train_step=train_step),
        mock.patch.object(checks, "check_machine", check_machine),
        # Several documents in a sequence, some over the edge of what a rank holds; Megatron's have up to 4096 tokens.
        mock.patch.multiple(MockGPTLowLevelDataset, max_sequence_length=20, __getitem__=_random_document),
    ):
        try:
            main(argv)
        except _Finished:
            return with_all_experts(found)
    raise ValueError("the run ended before its first step")
