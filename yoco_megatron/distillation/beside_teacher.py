"""A YOCO that runs beside its teacher, and what travels between pipeline stages for the two.

    [1, b, extra values, then those of the student's boundary tensor (parallel/pipeline/boundary.py)]

The extra ones are a model's own: a number for each token of a sequence that a rank holds.
"""

from math import prod

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from yoco_megatron.distillation.teacher_model import TeacherModel
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.query_shard import Runs, count
from yoco_megatron.parallel.pipeline.stages import Stage


class YOCOBesideTeacher(YOCOModel):
    """A YOCO, and the part of its teacher on this rank, which is no submodule: it is in no optimizer or checkpoint."""

    def attach(self, teacher: TeacherModel) -> None:
        """Give it the teacher."""
        self._teacher = (teacher,)

    @property
    def teacher(self) -> TeacherModel:
        """Its part on this rank."""
        return self._teacher[0]

    def extra_values(self, length: int) -> int:
        """Of a boundary tensor, for a sequence of `length` tokens; in proportion to that."""
        raise NotImplementedError

    def local_tokens(self, length: int) -> int:
        """Those of a sequence of `length` that this context-parallel rank holds."""
        return length // self.cp_group.size()

    def boundary_shape(
        self, stage: Stage, micro_batch_size: int, length: int, queries: int | None = None
    ) -> tuple[int, int, int]:
        """As `YOCOModel.boundary_shape`, extra values included."""
        own = super().boundary_shape(stage, micro_batch_size, length, queries)
        return 1, micro_batch_size, prod(own) // micro_batch_size + self.extra_values(length)

    def take_extra(self, query_runs: Runs | None) -> Tensor:
        """Leave the student's part of what arrived to it; returns the extra values, flat, and a view.

        The sequence's length follows from the number of all values, which is a linear function of it.
        """
        arrived = self.input_tensor
        assert arrived is not None
        batch, unit = arrived.shape[1], self.cp_group.size() * self.tokens_per_row
        queries = None if query_runs is None else count(query_runs)
        one, two = (prod(self.boundary_shape(self.stage, 1, n * unit, queries)) for n in (1, 2))
        length = unit * (1 + (arrived.shape[2] - one) // (two - one))
        own = super().boundary_shape(self.stage, batch, length, queries)
        extra, rest = arrived.view(-1).split((batch * self.extra_values(length), prod(own)))
        self.input_tensor = rest.view(own)
        return extra

    def with_extra(self, extra: Tensor, boundary_tensor: Tensor) -> Tensor:
        """What the next stage gets: a fresh tensor, see `join_boundary_tensor`."""
        batch = boundary_tensor.shape[1]
        joined = torch.cat((extra.reshape(-1), boundary_tensor.reshape(-1))).view(1, batch, -1)
        return make_viewless_tensor(joined, requires_grad=joined.requires_grad, keep_graph=True)
