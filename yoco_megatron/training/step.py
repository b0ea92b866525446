"""`forward_step`, which Megatron's schedules call for each micro-batch, and the loss that they reduce."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial, reduce
from operator import add

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from yoco_megatron.training.batch import get_batch
from yoco_megatron.training.micro_batches import MicroBatches, micro_batches

SPIKY_LOSS_FACTOR = 10  # --check-for-spiky-loss reports a loss of this many times the largest recent one
straggler = StragglerDetector()


def loss_terms(args: Namespace) -> dict[str, float]:
    """What the losses are that the model returns for each token, and their weights in the sum that is trained on."""
    if args.teacher is None:
        depths = args.mtp_num_layers or 0
        later = {f"mtp_{depth + 1} loss": args.mtp_loss_scaling_factor / depths for depth in range(depths)}
        return {"lm loss": 1.0} | ({"z loss": args.z_loss_coeff} if args.z_loss_coeff else {}) | later
    if args.attention_transfer:
        return {"attention transfer loss": 1.0}
    return {"lm loss": 1 - args.distillation_weight, "distillation loss": args.distillation_weight}


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of unmasked tokens.

    Args:
        loss_mask: fp32 [b, s], or [1 + layers, b, s] with those of multi-token prediction, whose terms are the last.
        losses: fp32 [b, s], or [terms, b, s] of several (`loss_terms`).
    Returns:
        (weighted sum, number of unmasked tokens int32, {"lm loss": [sum, tokens]} and so of each term); Megatron
        divides by the tokens. With CP, scaled so that the mean of loss / num_tokens over CP ranks is the global mean.
    """
    terms = loss_terms(get_args())
    masks = loss_mask.float().reshape(-1, loss_mask.shape[-2] * loss_mask.shape[-1])
    counted = [(mask, mask.sum().detach().to(torch.int)) for mask in masks]
    counted = counted[:1] * (len(terms) - len(counted)) + counted  # the first mask is of several terms
    sums = [torch.sum(one.float() * mask) for one, (mask, _) in zip(losses.reshape(len(terms), -1), counted)]
    loss = reduce(add, (weight * one for weight, one in zip(terms.values(), sums)))
    _validate(loss)
    num_tokens = counted[0][1]
    report = {
        name: torch.stack((one.detach(), count.to(one.dtype))) for name, one, (_, count) in zip(terms, sums, counted)
    }
    ranks = mpu.get_context_parallel_world_size()
    if ranks > 1 and not get_args().calculate_per_token_loss:
        # Megatron takes the mean over this rank's tokens, then over ranks; the mean over whole sequences is wanted.
        torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
        loss = loss * ranks
    return loss, num_tokens, report


def _validate(loss: Tensor) -> None:
    """Report NaN, Inf and spikes to the rerun state machine, which distinguishes a bad GPU from a bad batch."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, rejects in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def forward_step(
    data_iterator: MicroBatches, model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Run one micro-batch.

    Args:
        data_iterator: what `forward_step.micro_batches` makes of Megatron's iterator, once for each call of a schedule
            (upstream/training_loop.py).
        model: a model chunk, wrapped as Megatron wraps it.
    Returns:
        (losses fp32 [b, s], or the boundary tensor before the last stage; the function that reduces losses).
    """
    args, timers = get_args(), get_timers()
    micro_batch_size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    timers("batch-generator", log_level=2).start()
    with straggler(bdata=True):
        sample, runs = next(data_iterator)
        batch = get_batch(sample, runs, micro_batch_size, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with straggler:
        more = {}
        if args.architecture == "yoco":  # Megatron's GPT knows neither; fewer labels are fewer losses
            more = {"document_ids": batch["document_ids"], "query_runs": runs, "later_labels": batch["later_labels"]}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)
    mask, later = batch["loss_mask"], batch["later_labels"]
    if later is not None:
        assert mask is not None  # the stage has labels
        mask = torch.cat((mask[None], mask * (later >= 0)))
    return output, partial(loss_func, mask)  # type: ignore[arg-type]  # None before the last stage


forward_step.micro_batches = micro_batches  # type: ignore[attr-defined]
