"""Distillation: losses compare a YOCO with the labels and with its teacher's logits.

Between pipeline stages the teacher's hidden states travel beside the student's. Their gradient, zero, travels back.
"""

from typing import Any

import torch
from torch import Tensor

from yoco_megatron.distillation.beside_teacher import YOCOBesideTeacher
from yoco_megatron.distillation.teacher_model import TeacherModel
from yoco_megatron.model.layers.output_layer import ChunkedLossOutputLayer
from yoco_megatron.ops.linear_cross_entropy import linear_distillation
from yoco_megatron.parallel.context.query_shard import Runs


class DistillationOutputLayer(ChunkedLossOutputLayer):
    """An output layer whose losses are two: cross entropy, and divergence from a teacher's logits."""

    temperature: float
    teacher_entries: int

    def losses(  # type: ignore[override]  # `forward` passes on what it is given
        self, x: Tensor, weight: Tensor, labels: Tensor, main_grad: Tensor | None, *, teacher: tuple[Tensor, Tensor]
    ) -> Tensor:
        """fp32 [2, N]. `teacher`: its normalised hidden states [s, b, h'] and its head [V/tp, h']."""
        states, teacher_weight = teacher
        return torch.stack(
            linear_distillation(
                x,
                weight,
                labels,
                states.flatten(0, 1),
                teacher_weight,
                self.temperature,
                self.loss_chunk_size,
                self.tp_group,
                main_grad,
                self.teacher_entries,
            )
        )


class DistilledYOCO(YOCOBesideTeacher):
    """A YOCO that with labels returns losses fp32 [2, b, s]: cross entropy, and divergence from its teacher."""

    def attach(self, teacher: TeacherModel, temperature: float = 1.0) -> None:
        """Give it the teacher. `temperature` divides both models' logits where they are compared."""
        super().attach(teacher)
        if self.post_process:
            self.output_layer.__class__ = DistillationOutputLayer
            self.output_layer.temperature, self.output_layer.teacher_entries = temperature, teacher.entries

    def forward(self, input_ids: Tensor | None, *args: Any, query_runs: Runs | None = None, **kwargs: Any) -> Tensor:
        """As `YOCOModel.forward`, but for the number of losses."""
        if not self.pre_process:
            extra = self.take_extra(query_runs).detach()
            assert self.input_tensor is not None
            batch, width = self.input_tensor.shape[1], self.teacher.config.hidden_size
            self.teacher.set_input_tensor(extra.view(-1, batch, width))
        with torch.no_grad():
            states = self.teacher(input_ids, document_ids=kwargs.get("document_ids"), query_runs=query_runs)
        self._teacher_states: Tensor | None = states
        output = super().forward(input_ids, *args, **kwargs | {"query_runs": query_runs})
        self._teacher_states = None
        return output if self.post_process else self.with_extra(states, output)

    def head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        """As `YOCOModel.head`, with labels both losses."""
        if labels is None:
            return super().head(hidden_states, labels)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        teacher = self._teacher_states, self.teacher.output_layer.weight
        return self.output_layer(self.final_layernorm(hidden_states), weight=weight, labels=labels, teacher=teacher)

    def extra_values(self, length: int) -> int:
        """The teacher's hidden states."""
        return self.local_tokens(length) // self.tokens_per_row * self.teacher.config.hidden_size
