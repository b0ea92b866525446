"""Steps as vLLM schedules them, without vLLM: pieces of sequences, and what its metadata says of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

LENGTHS, SLOTS = (37, 1, 150, 20, 9), 9


@dataclass
class Batch:
    num_decodes: int
    num_prefills: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    state_indices_tensor: torch.Tensor


class Scheduler:
    """Takes random pieces of some sequences, as vLLM orders them: those of one token first."""

    def __init__(self, draw: torch.Generator):
        self.draw, self.done = draw, [0] * len(LENGTHS)
        self.slots = 1 + torch.randperm(SLOTS - 1, generator=draw)[: len(LENGTHS)]  # slot 0 is vLLM's own

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.draw))

    def steps(self) -> Iterator[tuple[list[tuple[int, slice]], Batch]]:
        """(sequence, its tokens) of each piece, and the batch of them; until all sequences are done."""
        while left := [i for i in range(len(LENGTHS)) if self.done[i] < LENGTHS[i]]:
            taken = {
                i: min(LENGTHS[i] - self.done[i], 1 + self.below(2) * self.below(60)) for i in left if self.below(3)
            }
            order = sorted(taken, key=lambda i: taken[i] > 1)
            if order:
                pieces = [slice(self.done[i], self.done[i] + taken[i]) for i in order]
                for i in order:
                    self.done[i] += taken[i]
                yield list(zip(order, pieces)), self.describe(order, taken)

    def describe(self, order: list[int], taken: dict[int, int]) -> Batch:
        decodes = sum(taken[i] == 1 for i in order)
        starts = torch.tensor([0, *(taken[i] for i in order)]).cumsum(0)
        seen = torch.tensor([self.done[i] for i in order])
        return Batch(decodes, len(order) - decodes, starts, seen, self.slots[order])
