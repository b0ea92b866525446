"""YOCO (paper section 2): embedding -> self-decoder -> one shared K,V -> cross-decoder -> head."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from yoco_megatron import runtime
from yoco_megatron.config.memory_units import memory_width
from yoco_megatron.model import specs
from yoco_megatron.model.layers.embedding import GradAccumulatingEmbedding, can_accumulate_in_place
from yoco_megatron.model.layers.output_layer import ChunkedLossOutputLayer
from yoco_megatron.model.layers.rotary import YOCORotaryEmbedding
from yoco_megatron.model.multi_token_prediction import MultiTokenPrediction
from yoco_megatron.model.yoco_block import YOCOBlock
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.query_shard import QueryShard, Runs, count
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.pipeline.boundary import join_boundary_tensor, kv_values, split_boundary_tensor
from yoco_megatron.parallel.pipeline.stages import Stage, StagePlan


class YOCOModel(LanguageModule):
    """A YOCO language model, or one pipeline stage of it.

    Args:
        vocab_size: padded vocabulary, a multiple of the tensor-parallel size.
        max_sequence_length: passed to Megatron's embedding; rotary angles have no limit.
        rotary_base: theta of the rotary frequencies.
        stage: what this part holds; None for the whole model.
        share_embeddings_and_output_weights: one matrix for both (the sqrt(h) scale applies to the input alone).
        parallel_output: leave logits split over tensor-parallel ranks, as the parallel cross entropy wants them.
    """

    block_class: type[YOCOBlock] = YOCOBlock

    def __init__(
        self,
        config: YOCOConfig,
        vocab_size: int,
        max_sequence_length: int,
        rotary_base: float = 10000.0,
        stage: Stage | None = None,
        share_embeddings_and_output_weights: bool = False,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.stage = stage = stage or StagePlan.of(config, [config.num_layers]).stage(0)
        self.pre_process, self.post_process = stage.pre_process, stage.post_process
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.fp16_lm_cross_entropy, self.parallel_output = fp16_lm_cross_entropy, parallel_output
        self.input_tensor: Tensor | None = None
        # By Megatron's name: the last stage holds a copy of the embedding, kept equal like that of a tied head.
        self.mtp_process = stage.mtp_layers > 0

        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, max_sequence_length, position_embedding_type="rope", tp_group=self.tp_group
            )
            if can_accumulate_in_place(config, share_embeddings_and_output_weights):
                GradAccumulatingEmbedding.convert(self.embedding.word_embeddings)
        self_head_dim = config.self_decoder_head_dim
        self.self_rotary = YOCORotaryEmbedding(config, self_head_dim, rotary_base)
        self.cross_rotary = YOCORotaryEmbedding(config, config.kv_channels, rotary_base)
        self.decoder = self.block_class(config, stage, self.pg_collection, vp_stage)
        self.groups = config.num_query_groups // self.tp_group.size()
        self.memory_width = memory_width(config) // self.tp_group.size()
        self.tokens_per_row = self.tp_group.size() if config.sequence_parallel else 1
        if self.post_process:
            # The head is Megatron's linear, not Transformer Engine's, and fuses gradients with Apex alone.
            head_config = copy.copy(config)
            head_config.gradient_accumulation_fusion &= runtime.has_fused_weight_gradient()
            self.final_layernorm = specs.backend_for(config).layer_norm(rms_norm=True)(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=not parallel_output,
                skip_weight_param_allocation=share_embeddings_and_output_weights
                and (self.pre_process or self.mtp_process),
                tp_group=self.tp_group,
            )
            if size := config.loss_chunk_size:
                ChunkedLossOutputLayer.convert(
                    self.output_layer, size, config.gradient_accumulation_fusion, config.z_loss_coeff > 0
                )
        for depth in range(stage.mtp_layers):  # not in a ModuleList, whose parts Megatron would save as if whole
            layer = MultiTokenPrediction(config, depth, self.block_class, self.pg_collection)
            self.add_module(f"mtp_{depth}", layer)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous pipeline stage sent, in place of an embedding (called by Megatron's schedules)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: None = None,
        document_ids: Tensor | None = None,
        query_runs: Runs | None = None,
        later_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss per token, or logits; on a stage before the last, the tensor for the next one (pipeline/boundary.py).

        With context parallelism s is the number of tokens that this rank holds, zig-zag (context/sequence_shard.py).

        Args:
            input_ids: int64 [b, s]; read by the first stage alone.
            position_ids, attention_mask, loss_mask, packed_seq_params: ignored; attention is always causal, positions
                are counted in each document, and a loss is masked where it is summed.
            labels: int64 [b, s], with `query_runs` [b, m]; None asks for logits.
            document_ids: integers [b, whole sequence], equal within a document and non-decreasing, read by every stage:
                a token attends to its own document alone. None for one document. On the host, or on the device.
            query_runs: the positions of the whole sequence that are computed behind the shared K,V, the same on every
                stage and rank (context/query_shard.py): m of them on this rank. None for all.
            later_labels: int64 [layers of multi-token prediction, b, s], with `query_runs` [.., m]: the tokens after
                `labels`, -1 where there is no loss. None: these layers are not computed.
        Returns:
            fp32 loss [b, s], or of several terms [terms, b, s]: cross entropy, z-loss, each layer of multi-token
            prediction. Or logits [b, s, vocabulary] ([.., vocabulary/tp] with `parallel_output`). With `query_runs` m
            instead of s.
        """
        shared: list[Tensor] = []
        config = self.config
        hidden_states = self.embed(input_ids, position_ids) if self.pre_process else self.input_tensor
        assert hidden_states is not None
        ranks, batch = self.cp_group.size(), hidden_states.shape[1]
        if self.stage.receives_shared:
            hidden_shape, shapes = self._arriving_shapes(hidden_states, query_runs)
            hidden_states, shared = split_boundary_tensor(hidden_states, hidden_shape, shapes, config.sends_fp32_kv)
        length = shared[0].shape[0] if self.stage.kv_in else hidden_states.shape[0] * self.tokens_per_row
        group = self.cp_group if ranks > 1 else None
        shard = SequenceShard(length * ranks, batch, document_ids, group, hidden_states.device)
        positions = shard.positions()
        self_angles, cross_angles = self.self_rotary(positions), self.cross_rotary(positions)
        queries: SequenceShard | QueryShard = shard
        query_angles = cross_angles
        if query_runs is not None:
            rows_group = self.pg_collection.tp_cp if config.sequence_parallel else group
            queries = QueryShard(shard, query_runs, rows_group, self.tokens_per_row)
            query_angles = self.cross_rotary(queries.positions())
        hidden_states, shared = self.decoder(
            hidden_states, shared, self_angles, cross_angles, shard, queries, query_angles
        )
        if self.post_process:
            output = self.head(hidden_states, labels)
            if later_labels is None:
                return output
            assert labels is not None
            places = self_angles, query_angles, shard, queries, query_angles
            later = self._later_losses(hidden_states, shared[-1], labels, later_labels, *places)
            return torch.cat((output.reshape(-1, *labels.shape), torch.stack(list(later))))
        if not shared:
            return make_viewless_tensor(hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)
        return join_boundary_tensor(hidden_states, shared, config.sends_fp32_kv)

    def _later_losses(
        self, hidden_states: Tensor, kv: Tensor, labels: Tensor, later_labels: Tensor, *places: Any
    ) -> Iterator[Tensor]:
        """fp32 cross entropy [b, s] of each layer of multi-token prediction, 0 where there is none."""
        for depth, later in enumerate(later_labels):
            layer = self.get_submodule(f"mtp_{depth}")
            hidden_states = layer(hidden_states, self.embed(labels.clamp(min=0), None), kv, *places)
            losses = self.head(hidden_states, later.clamp(min=0)).reshape(-1, *later.shape)[0]
            yield torch.where(later >= 0, losses, 0.0)
            labels = later

    def boundary_shape(
        self, stage: Stage, micro_batch_size: int, length: int, queries: int | None = None
    ) -> tuple[int, int, int]:
        """Shape of the boundary tensor that enters `stage` on this rank.

        Args:
            length: tokens of a whole sequence; queries: those of them that are computed behind the shared K,V.
        """
        tokens = length // self.cp_group.size()
        if not stage.receives_shared:
            return tokens // self.tokens_per_row, micro_batch_size, self.config.hidden_size
        behind = stage.is_behind(self.config.num_self_decoder_layers)
        rows = (queries if behind and queries is not None else length) // self.cp_group.size() // self.tokens_per_row
        kv, memory = self._shared_values_per_token(stage)
        return 1, micro_batch_size, rows * (self.config.hidden_size + self.tokens_per_row * memory) + tokens * kv

    def _shared_values_per_token(self, stage: Stage) -> tuple[int, int]:
        """Of all sets of K,V that enter `stage`, and of the memory, see `kv_values`."""
        fp32 = self.config.sends_fp32_kv
        one_set = kv_values((self.groups, 2, self.config.kv_channels), fp32)
        return len(stage.kv_in) * one_set, stage.memory_in * kv_values((self.memory_width,), fp32)

    def _arriving_shapes(
        self, boundary_tensor: Tensor, query_runs: Runs | None
    ) -> tuple[tuple[int, int, int], list[tuple[int, ...]]]:
        """Of hidden states, each set of K,V and the memory in it. The number of tokens follows from its size."""
        _, batch, values = boundary_tensor.shape
        stage, split, hidden = self.stage, self.tokens_per_row, self.config.hidden_size
        kv, memory = self._shared_values_per_token(stage)
        if query_runs is None or not stage.is_behind(self.config.num_self_decoder_layers):
            rows = values // (hidden + split * (kv + memory))
            tokens = rows * split
        else:
            rows = count(query_runs) // self.cp_group.size() // split
            tokens = (values - rows * (hidden + split * memory)) // kv
        shapes: list[tuple[int, ...]] = [(tokens, batch, self.groups, 2, self.config.kv_channels)] * len(stage.kv_in)
        shapes += [(rows * split, batch, self.memory_width)] * stage.memory_in
        return (rows, batch, hidden), shapes

    def embed(self, input_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """X^0 = sqrt(h) E[tokens], [s, b, h] ([s/tp, b, h] with sequence parallelism)."""
        hidden_states = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return hidden_states * math.sqrt(self.config.hidden_size) if self.config.scale_embedding else hidden_states

    def head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        """Logits RMSNorm(X^L) W_vocab [b, s, vocabulary/tp], or with labels their cross entropy, fp32 [b, s]
        ([2, b, s] with the z-loss)."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        hidden_states = self.final_layernorm(hidden_states)
        if labels is not None and self.config.loss_chunk_size:
            return self.output_layer(hidden_states, weight=weight, labels=labels)
        logits, _ = self.output_layer(hidden_states, weight=weight)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)
