"""Megatron's model on any mesh: answers are read off forward passes through its schedule.

Each process calls the same methods with the same requests, and gets all answers. Sequences are padded on the right,
where causal layers do not see it, and spread over the data-parallel ranks; a YOCO's cross-decoder runs at the positions
that are asked for. There is no cache: a greedy continuation is found by verification. A draft stands behind the prompt,
what the model would have said at each of its positions shows how far it agrees, the first difference is corrected, and
so on: as exact as decoding token by token, and one pass where the draft is right.

An answer depends on the mesh and on what is in a batch beside it by rounding alone: see cached.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import training
from torch import Tensor

from yoco_megatron import runtime
from yoco_megatron.evaluation.backends.batching import in_order
from yoco_megatron.evaluation.backends.logits import excluded_ids, read_logits
from yoco_megatron.evaluation.requests import Generate, Likelihood, Score, Tokenizer, TokenLosses
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.query_shard import Runs, dealt_runs, positions_of, queries_multiple
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.training.micro_batches import MaskedMicroBatches, MicroBatches
from yoco_megatron.training.query_positions import PositionCounts

ROWS = 32
"""Lengths are multiples of it: kernels are prepared anew for each shape."""
LOGITS = 1 << 28
"""Logits that a micro-batch makes at most on a process, where it makes them at all and has more than one sequence."""


@dataclass(frozen=True)
class Row:
    """A sequence of which tokens[first:] are asked; ids, or an int64 array."""

    tokens: Any
    first: int

    @property
    def asked(self) -> int:
        """How many tokens."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed together; the positions start to stop - 1 of each are read."""

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]  # of the rows among all of a pass; there are fewer than rows, where some only fill up
    start: int
    stop: int
    runs: Runs | None

    def tensors(self, length: int) -> tuple[Tensor, Tensor]:
        """(tokens, labels), int64 [b, length], padded with zeros."""
        padded = np.zeros((2, len(self.rows), length), dtype=np.int64)
        for index, row in enumerate(self.rows):
            padded[0, index, : len(row.tokens) - 1] = row.tokens[:-1]
            padded[1, index, : len(row.tokens) - 1] = row.tokens[1:]
        tokens, labels = torch.from_numpy(padded).to(runtime.device())
        return tokens, labels


def _runs(batch: MicroBatch) -> tuple[Runs | None, PositionCounts]:
    return batch.runs, PositionCounts()


class MeshBackend:
    """Answers requests with the model that this process holds a part of.

    Args:
        model: the model chunks of this process.
        max_length: tokens of the longest sequence.
        token_budget: tokens of a micro-batch of longer sequences; at least one sequence.
        vocab_size: ids from it on are padding of the vocabulary, and in no continuation; None for none.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        tokenizer: Tokenizer | None,
        max_length: int,
        token_budget: int,
        vocab_size: int | None = None,
        name: str = "mesh",
    ) -> None:
        self.chunks = unwrap_model(list(model))
        self.name, self.max_length, self.token_budget, self.vocab_size = name, max_length, token_budget, vocab_size
        self.tokenizer: Any = tokenizer
        self.config = config = self.chunks[0].config
        self.is_yoco = isinstance(self.chunks[0], YOCOModel)
        self.replicas, self.replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        self.multiple = queries_multiple(config)
        self.longest = -(-max_length // self.multiple) * self.multiple

    # -- the three kinds of requests

    def generate(self, requests: Sequence[Generate]) -> Iterator[list[int]]:
        """The greedy continuation of each prompt."""
        return in_order(requests, lambda one: len(one.prompt) + one.max_new_tokens, self.max_length, self._generate)

    def score(self, requests: Sequence[Score]) -> Iterator[list[Likelihood]]:
        """The likelihoods of each request's continuations."""

        def length(one: Score) -> int:
            return len(one.context) + max(map(len, one.continuations))

        return in_order(requests, length, self.max_length, self._score)

    def token_losses(self, requests: Sequence[TokenLosses]) -> Iterator[np.ndarray]:
        """fp32 losses of each request's tokens from `first` on."""
        return in_order(requests, lambda one: len(one.tokens), self.max_length, self._token_losses)

    def _token_losses(self, requests: list[TokenLosses]) -> Iterator[tuple[int, np.ndarray]]:
        found = self._pass([Row(one.tokens, one.first) for one in requests])
        yield from enumerate(losses.astype(np.float32) for (losses,) in found)

    def _score(self, requests: list[Score]) -> Iterator[tuple[int, list[Likelihood]]]:
        rows = [Row(one.context + choice, len(one.context)) for one in requests for choice in one.continuations]
        found = iter(zip(rows, self._pass(rows, excluded=())))
        for index, one in enumerate(requests):
            answer = []
            for _ in one.continuations:
                row, (losses, likeliest) = next(found)
                answer.append(Likelihood(-float(losses.sum()), tuple(likeliest.tolist()) == row.tokens[row.first :]))
            yield index, answer

    def _generate(self, requests: list[Generate]) -> Iterator[tuple[int, list[int]]]:
        by_banned: dict[frozenset[int], list[int]] = {}
        for number, one in enumerate(requests):
            by_banned.setdefault(one.banned, []).append(number)
        for numbers in by_banned.values():
            yield from self._verify(requests, numbers)

    def _verify(self, requests: list[Generate], numbers: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Continue the prompts of these requests, which ban the same ids."""
        known: dict[int, list[int]] = {number: [] for number in numbers}
        drafts = {number: list(requests[number].expected) for number in numbers}
        while known:
            rows = []
            for number, new in known.items():
                one, draft = requests[number], drafts[number]
                left = one.max_new_tokens - len(new)
                draft = (draft + [one.prompt[-1]] * left)[:left]
                drafts[number] = draft
                rows.append(Row((*one.prompt, *new, *draft), len(one.prompt) + len(new)))
            answers = iter(self._pass([row for row in rows if row.asked], requests[numbers[0]].banned))
            for number, row in zip(list(known), rows):
                one, new = requests[number], known[number]
                likeliest = next(answers)[1].tolist() if row.asked else []
                both = enumerate(zip(drafts[number], likeliest))
                agreeing = next((at for at, (drafted, own) in both if drafted != own), len(likeliest))
                accepted = likeliest[: agreeing + 1]
                stop = next((at for at, token in enumerate(accepted) if token in one.stop), None)
                new += accepted[:stop]
                drafts[number] = likeliest[len(accepted) :]
                if stop is not None or len(new) == one.max_new_tokens:
                    yield number, known.pop(number)

    # -- one pass over many rows

    @torch.no_grad()
    def _pass(self, rows: Sequence[Row], excluded: Any = None) -> list[tuple[np.ndarray, ...]]:
        """Per row the losses of the asked tokens, float64 [asked]; with `excluded` also the likeliest ids but these.

        Losses alone are computed as in training, from logits of a few positions at a time.
        """
        lengths = [self._padded(len(row.tokens) - 1, self.longest) for row in rows]
        answers: list[Any] = [None] * len(rows)
        width = self.chunks[0].vocab_size // self.config.tensor_model_parallel_size
        budget = self.token_budget if excluded is None else min(self.token_budget, LOGITS // width)
        for length in sorted(set(lengths), reverse=True):
            numbers = [number for number, one in enumerate(lengths) if one == length]
            numbers.sort(key=lambda number: (rows[number].first, len(rows[number].tokens)))  # runs alike
            microbatches = self._microbatches(rows, numbers, length, budget)
            for batch, found in zip(microbatches, self._run(microbatches, length, excluded)):
                for index, number in enumerate(batch.numbers):
                    row = rows[number]
                    asked = slice(row.first - 1 - batch.start, len(row.tokens) - 1 - batch.start)
                    losses, ids = found[:, index, asked]
                    answers[number] = (losses,) if excluded is None else (losses, ids.astype(np.int64))
        return answers

    def _padded(self, count: int, most: int) -> int:
        """A multiple of what the mesh needs, at least `count`: at most a quarter more, of few different values."""
        step = -(-ROWS // self.multiple) * self.multiple
        while step * 8 <= count:
            step *= 2
        return min(-(-count // step) * step, most)

    def _microbatches(self, rows: Sequence[Row], numbers: list[int], length: int, budget: int) -> list[MicroBatch]:
        """As many for each data-parallel rank, all of one shape; the last rows fill up."""
        share = -(-len(numbers) // self.replicas)
        size = max(1, min(budget // length, 1 << (share - 1).bit_length()))
        made = [self._microbatch(rows, numbers[at : at + size], size, length) for at in range(0, len(numbers), size)]
        # An interleaved pipeline takes whole groups of micro-batches.
        group = self.config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        filler = MicroBatch(made[-1].rows, (), made[-1].start, made[-1].stop, made[-1].runs)
        return made + [filler] * (-len(made) % (self.replicas * group))

    def _microbatch(self, rows: Sequence[Row], numbers: list[int], size: int, length: int) -> MicroBatch:
        held = [rows[number] for number in numbers]
        held += held[-1:] * (size - len(held))
        start, stop = min(row.first for row in held) - 1, max(len(row.tokens) for row in held) - 1
        queries = self._padded(stop - start, length)
        first = max(0, stop - queries)
        runs = ((first, first + queries),) if self.is_yoco and queries < length else None
        return MicroBatch(tuple(held), tuple(numbers), start, stop, runs)

    def _run(self, microbatches: list[MicroBatch], length: int, excluded: Any) -> Iterator[np.ndarray]:
        """Of each micro-batch losses and likeliest ids, float64 [2, b, stop - start], on every process."""
        own = microbatches[self.replica :: self.replicas]
        chunks = self.chunks
        step = partial(self._forward_step, length=length, excluded=excluded)
        step.micro_batches = lambda data, _: MaskedMicroBatches(data, _runs)  # type: ignore[attr-defined]
        found = training.get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(own) for _ in chunks] if len(chunks) > 1 else iter(own),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(own),
            seq_length=length,
            micro_batch_size=len(own[0].rows),
            forward_only=True,
            collect_non_loss_data=True,
        )
        shapes = [(2, len(batch.rows), batch.stop - batch.start) for batch in microbatches]
        parts = [torch.zeros(shape, dtype=torch.float64, device=runtime.device()) for shape in shapes]
        if found and mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0:
            parts[self.replica :: self.replicas] = found
        everything = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(everything)  # one process has each answer, all others zeros
        split = everything.cpu().split([part.numel() for part in parts])
        return (values.view(shape).numpy() for values, shape in zip(split, shapes))

    def _forward_step(self, data: MicroBatches, chunk: torch.nn.Module, length: int, excluded: Any) -> Any:
        batch, runs = next(data)
        shard = SequenceShard(length, len(batch.rows), None, self._context_group(), runtime.device())
        tokens, labels = batch.tensors(length)
        if runs is None:
            positions = shard.positions()
        else:
            positions = positions_of(dealt_runs(runs, shard.ranks, shard.rank), runtime.device())
        labels = labels.index_select(1, positions)
        output = chunk(
            shard.local(tokens, 1),
            shard.positions().expand(len(tokens), -1),
            None,
            labels=labels if excluded is None else None,
            **({"query_runs": runs} if self.is_yoco else {}),
        )
        return output, partial(self._collect, batch, labels, positions, excluded)

    def _collect(
        self, batch: MicroBatch, labels: Tensor, positions: Tensor, excluded: Any, output: Tensor, non_loss_data: bool
    ) -> Tensor:
        """Of the last stage's output, losses [b, m] or logits [b, m, V/tp] at the `positions` held here, what the
        micro-batch asks for: float64 [2, b, stop - start]."""
        held = ((positions >= batch.start) & (positions < batch.stop)).nonzero()[:, 0]
        output, labels = output.index_select(1, held), labels.index_select(1, held)
        ids = torch.zeros_like(labels)
        losses = output
        if excluded is not None and len(held):
            group, width = mpu.get_tensor_model_parallel_group(), output.shape[-1]
            left_out = excluded_ids(excluded, self.vocab_size, group.rank() * width, width, output.device)
            read = read_logits(output.flatten(0, 1), labels.flatten(), left_out, group)
            losses, ids = (found.view_as(labels) for found in read)
        elif excluded is not None:
            losses = ids
        whole = torch.zeros(2, len(labels), batch.stop - batch.start, dtype=torch.float64, device=output.device)
        whole[:, :, positions[held] - batch.start] = torch.stack((losses.double(), ids.double()))
        if (group := self._context_group()) is not None:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def _context_group() -> dist.ProcessGroup | None:
        group = mpu.get_context_parallel_group()
        return group if group.size() > 1 else None
