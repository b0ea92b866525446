"""Attention transfer: the mixer of each of the student's layers is fitted to the attention of the teacher's same layer.

    x_i     hidden states that enter the teacher's layer i;  y_i = Attention_i(Norm_i(x_i))
    o_i     what the student's mixer makes of x_i with its own norm; in a cross-decoder layer its K,V are projected
            from x_border, with which the teacher enters that half
    loss    mean over layers i and tokens t of |o_it - y_it|^2 / mean_t |y_it|^2         (t over a micro-batch)

So one pass fits all layers, none on another's errors, and the loss is a relative error: 1 is an output of zeros. As in
LoLCATs (arXiv 2410.10254, stage 1) and MOHAWK (arXiv 2408.10189, stage 2). Only the mixers' own weights and those of
the shared K,V are trained (`is_trained`); embeddings, norms, FFNs and the head are the teacher's, and stay so.

Between pipeline stages travel the teacher's hidden states in the place of the student's, the student's K,V, and each
token's loss so far, so that the last stage has the whole loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from yoco_megatron.distillation.beside_teacher import YOCOBesideTeacher
from yoco_megatron.distillation.teacher_model import TeacherModel
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedReaders
from yoco_megatron.model.yoco_block import YOCOBlock
from yoco_megatron.parallel.context.query_shard import Runs
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.pipeline.boundary import from_bits, kv_values, to_bits


def is_trained(name: str) -> bool:
    """Whether attention transfer trains the parameter of a YOCOModel with this name."""
    return ("self_attention." in name or "shared_kv" in name) and "norm" not in name


class TransferBlock(YOCOBlock):
    """Layers through which the teacher's hidden states run, while each one's mixer is compared with the teacher's."""

    teacher: tuple[TeacherModel]
    compared: list[tuple[Tensor, Tensor]]
    """Of each layer so far, |o - y|^2 [s, b] (with sequence parallelism [s/tp, b]) and the sum of |y|^2."""

    def _run(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        readers: SharedReaders | None,
        angles: Tensor,
        shard: Any,
        before: int = 0,
    ) -> Tensor:
        assert isinstance(shard, SequenceShard), "all positions are compared"
        (teacher,) = self.teacher
        hidden = hidden.detach()
        teacher_angles = teacher.self_rotary(shard.positions()) if len(layers) else None
        layer: TransformerLayer
        for layer in layers:
            output, _ = layer.self_attention(
                layer.input_layernorm(hidden),
                None,
                attention_bias=readers,
                rotary_pos_emb=angles,
                packed_seq_params=shard,
            )
            with torch.no_grad():
                same = teacher.decoder.layers[layer.layer_number - 1 - self.stage.first]
                hidden, wanted = _attention_output_of(same, hidden, teacher_angles, shard)
            difference = output.to(wanted.dtype) - wanted
            self.compared.append((difference.square().sum(-1), wanted.square().sum()))
        return hidden


def _attention_output_of(
    layer: TransformerLayer, hidden: Tensor, angles: Tensor | None, shard: SequenceShard
) -> tuple[Tensor, Tensor]:
    """(hidden states behind a layer, what its attention added to them, at least in fp32)."""
    outputs: list[Tensor] = []

    def store(_: Any, __: Any, output: tuple[Tensor, Any]) -> None:
        # A copy: without gradients Megatron adds the residual in place.
        outputs.append(output[0].to(torch.promote_types(output[0].dtype, torch.float32), copy=True))

    hook = layer.self_attention.register_forward_hook(store)
    try:
        hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=shard)
    finally:
        hook.remove()
    return hidden, outputs[0]


class TransferYOCO(YOCOBesideTeacher):
    """A YOCO whose forward returns each token's attention transfer loss, fp32 [b, s]."""

    block_class = TransferBlock
    decoder: TransferBlock

    def attach(self, teacher: TeacherModel) -> None:
        super().attach(teacher)
        self.decoder.teacher = (teacher,)
        for name, param in self.named_parameters():
            param.requires_grad_(is_trained(name))

    def embed(self, input_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The teacher's."""
        with torch.no_grad():
            return self.teacher.embed(input_ids, position_ids)

    def forward(self, input_ids: Tensor | None, *args: Any, query_runs: Runs | None = None, **kwargs: Any) -> Tensor:
        """As `YOCOModel.forward`, at all positions; on the last stage the losses."""
        assert query_runs is None, "all positions are compared"
        earlier = None if self.pre_process else from_bits(self.take_extra(None))
        self.decoder.compared = []
        output = super().forward(input_ids, *args, **kwargs)
        losses = self._losses(earlier, input_ids, output.shape[1])
        return losses if self.post_process else self.with_extra(to_bits(losses, output.dtype), output)

    def head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        """The teacher's hidden states, of which nothing more is asked."""
        return hidden_states

    def _losses(self, earlier: Tensor | None, input_ids: Tensor | None, batch: int) -> Tensor:
        """fp32 [b, s]: those of earlier stages and of the layers held here."""
        if not self.decoder.compared:
            if earlier is not None:
                return earlier.view(batch, -1)
            assert input_ids is not None  # a stage of the embedding alone, which must send what has a gradient
            return torch.zeros(input_ids.shape, device=input_ids.device, requires_grad=True)
        errors, powers = (torch.stack(part) for part in zip(*self.decoder.compared))
        self.decoder.compared = []
        rows_group = self.pg_collection.tp_cp if self.config.sequence_parallel else self.cp_group
        tokens = errors[0].numel() * rows_group.size()
        if rows_group.size() > 1:
            dist.all_reduce(powers, group=rows_group)
        # Attention that adds nothing is nothing to be relative to: of such a layer the mean square counts.
        scales = torch.where(powers > 0, tokens / powers, 1 / self.config.hidden_size)
        losses = torch.einsum("lsb,l->sb", errors, scales / self.config.num_layers)
        if self.config.sequence_parallel:
            losses = tensor_parallel.gather_from_sequence_parallel_region(
                losses, tensor_parallel_output_grad=False, group=self.tp_group
            )
        losses = losses.t().contiguous()
        return losses if earlier is None else earlier.view(batch, -1) + losses

    def extra_values(self, length: int) -> int:
        """Losses, in fp32."""
        return kv_values((self.local_tokens(length),), self.config.pipeline_dtype.itemsize == 2)
