"""The layers of a YOCO, or of one pipeline stage of it: self-decoder, shared K,V, cross-decoder.

The block returns hidden states and the shared K,V that a later stage reads. Of several sets of K,V
(--shared-kv-sets) each has a group of cross-decoder layers, which run one after the other; each is projected where the
self-decoder reaches its source (--shared-kv-sources). A layer of the self-decoder leaves the memory of gated memory
units (--cross-decoder-pattern) behind as it runs, and therefore neither it as a whole nor its mixer is ever run again.

Megatron's `TransformerLayer`, and its full recompute, hand two arguments to the attention untouched that YOCO does not
need otherwise. They carry what is ours, so that YOCO needs no layer class of its own:

    packed_seq_params    the `SequenceShard`: which tokens these are, and of which documents (cross-decoder layers that
                         compute only positions with loss: the `QueryShard`, or `TravellingQueries`)
    attention_bias       the `SharedReaders` (cross-decoder layers); a list to add the memory to (its source)

The mixers give them their true names in the first line of `forward`.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.recompute import checkpointed_forward
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from yoco_megatron.config.experts import layers_with_experts
from yoco_megatron.config.kv_sets import layers_of_sets, source_name, sources_of
from yoco_megatron.config.memory_units import is_memory_unit, memory_source
from yoco_megatron.mixers import mixer_of_layer
from yoco_megatron.model import specs
from yoco_megatron.model.cross_decoder.shared_kv import SharedKV
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader, SharedReaders
from yoco_megatron.model.cross_decoder.travelling_queries import TravellingQueries, queries_travel
from yoco_megatron.model.layers.recompute import AttentionOutputStore
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.document_calls import DocumentCalls
from yoco_megatron.parallel.context.query_shard import QueryShard
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.pipeline.stages import Stage


class YOCOBlock(MegatronModule):
    """The layers of one stage, and the projection to the shared K,V if the stage makes them."""

    def __init__(
        self,
        config: YOCOConfig,
        stage: Stage,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        split_layer = config.num_self_decoder_layers
        backend = specs.backend_for(config)
        self_config = config.self_decoder_config()

        experts = layers_with_experts(config.num_moe_experts, config.moe_layer_freq, stage.last)

        def build(index: int) -> TransformerLayer:
            if index < split_layer:
                spec = mixer_of_layer(config.self_decoder, index).load("layer_spec")(backend)
            elif is_memory_unit(config, index):
                spec = specs.memory_unit_layer(backend)
            else:
                spec = specs.cross_decoder_layer(backend)
            with get_fp8_context(config, index, is_init=True) if config.fp8 else nullcontext():
                return build_module(
                    specs.with_experts(spec, backend, config) if experts[index] else spec,
                    config=self_config if index < split_layer else config,
                    layer_number=index + 1,
                    pg_collection=pg_collection,
                    vp_stage=vp_stage,
                    add_layer_offset=False,
                )

        self.layers = nn.ModuleList(build(index) for index in range(stage.first, stage.last))
        self.num_self, self.num_cross = stage.split(split_layer)
        self.stage = stage
        self.memory_source = memory_source(config)
        sources = sources_of(config)
        self.kv_names = {source: source_name(source, sources) for source in stage.kv_sources}
        for name in self.kv_names.values():
            with get_fp8_context(config, is_init=True) if config.fp8 else nullcontext():
                self.add_module(name, SharedKV(config, specs.shared_kv(backend), pg_collection))

    def forward(
        self,
        hidden_states: Tensor,
        shared: Sequence[Tensor],
        self_angles: Tensor,
        cross_angles: Tensor,
        shard: SequenceShard,
        queries: SequenceShard | QueryShard,
        query_angles: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] with sequence parallelism).
            shared: from earlier stages, of the tokens held here: the shared K,V [s, b, G, 2, D], `stage.kv_in`, and if
                `stage.memory_in` the memory [s, b, W], behind the self-decoder that of `queries` [m, b, W].
            self_angles, cross_angles: rotary angles [s, 1 or b, 1, head width] of the two halves.
            shard: which tokens these are, and of which documents.
            queries: the positions that are computed behind the shared K,V; `shard` for all.
            query_angles: rotary angles [m, 1 or b, 1, head width] of `queries`; `cross_angles` for all.
        Returns:
            hidden states, shaped as they came in, behind the self-decoder those of `queries` [m, b, h], and the sets
            `stage.kv_out` of K,V, in fp32 if they are sent so; before multi-token prediction the last set. Behind them
            the memory, if `stage.memory_out`.
        """
        config, stage = self.config, self.stage
        assert len(shared) == len(stage.kv_in) + stage.memory_in, "what earlier stages made and the stage do not fit"
        sets, memory = list(shared[: len(stage.kv_in)]), list(shared[len(stage.kv_in) :])
        delayed = bool(config.fp8) and config.fp8_recipe == Fp8Recipe.delayed
        rng = tensor_parallel.get_cuda_rng_tracker().fork() if config.sequence_parallel else nullcontext()
        with rng, get_fp8_context(config) if delayed else nullcontext():
            first = 0
            for last in self._stops():
                layers = self.layers[first:last]
                if stage.first + first == self.memory_source:
                    hidden_states = self._run_once(layers, hidden_states, memory, self_angles, shard)
                else:
                    hidden_states = self._run(layers, hidden_states, None, self_angles, shard, first)
                first = last
                if name := self.kv_names.get(stage.first + last):
                    with self._layer_fp8(stage.first + last):
                        sets += self.get_submodule(name)(hidden_states, cross_angles)
            return self._cross_decoder(hidden_states, sets, memory, query_angles, shard, queries)

    def _stops(self) -> list[int]:
        """Layers of the self-decoder held here behind which it stops: at sources of K,V, around that of the memory, and
        at its end."""
        stops = {self.num_self, *(source - self.stage.first for source in self.kv_names)}
        if self.memory_source is not None:
            before = self.memory_source - self.stage.first
            stops |= {stop for stop in (before, before + 1) if 0 < stop <= self.num_self}
        return sorted(stops)

    def _cross_decoder(
        self,
        hidden_states: Tensor,
        kv_sets: Sequence[Tensor],
        memory: Sequence[Tensor],
        angles: Tensor,
        shard: SequenceShard,
        queries: SequenceShard | QueryShard,
    ) -> tuple[Tensor, list[Tensor]]:
        """Where the self-decoder ends, its queries; then each set's group of layers held here, and units between them.
        Arguments and result are those of `forward`; `memory` has one or none."""
        config, stage, split_layer = self.config, self.stage, self.config.num_self_decoder_layers
        if isinstance(queries, QueryShard) and stage.last >= split_layer and not stage.is_behind(split_layer):
            hidden_states = queries.take(hidden_states)
            memory = [queries.take_whole(x) for x in memory]
        attended: SequenceShard | QueryShard | TravellingQueries = queries
        gather = documents = None
        if self.num_cross and shard.document_ids is not None:
            documents = DocumentCalls(shard, [(chunk.start, chunk.stop) for chunk in queries.chunks])
        elif self.num_cross and shard.ranks > 1:
            attended = self._travelling(queries)
            gather = shard if attended is queries else None
        groups = layers_of_sets(
            config.num_layers,
            config.num_self_decoder_layers,
            config.shared_kv_sets,
            config.mtp_num_layers or 0,
            config.cross_decoder_pattern,
        )
        dtype, out_dtype = config.params_dtype, torch.float32 if config.sends_fp32_kv else config.params_dtype
        out, readers, first = [], SharedReaders(), self.num_self
        if memory and self.num_cross:
            hidden_states, readers.memory = SharedKVReader.enter(hidden_states, memory[0], dtype)
        for kv, group in zip(kv_sets, groups[stage.kv_in.start :]):
            if group.start >= stage.last:
                out.append(kv.to(out_dtype))
                continue
            start, stop = max(first, group.start - stage.first), group.stop - stage.first
            hidden_states = self._run_cross(first, start, hidden_states, readers, angles, attended)
            hidden_states, kv_reader = SharedKVReader.enter(hidden_states, kv, dtype, gather, documents)
            of_group = replace(readers, kv=kv_reader)
            hidden_states = self._run_cross(start, stop, hidden_states, of_group, angles, attended)
            first = stop
            if group.stop > stage.last:
                out.append(kv_reader.read_stacked(out_dtype))
        hidden_states = self._run_cross(first, None, hidden_states, readers, angles, attended)
        if stage.memory_out:
            out.append(readers.memory.read_stacked(out_dtype) if readers.memory else memory[0].to(out_dtype))
        return hidden_states, out

    def _run_cross(
        self, first: int, last: int | None, hidden: Tensor, readers: SharedReaders, angles: Tensor, attended: Any
    ) -> Tensor:
        return self._run(self.layers[first:last], hidden, readers, angles, attended, first - self.num_self)

    def _travelling(self, queries: SequenceShard | QueryShard) -> SequenceShard | QueryShard | TravellingQueries:
        """`queries` as layers attend with them: as they are, or travelling between context-parallel ranks."""
        if not isinstance(queries, QueryShard):
            return queries
        shard = queries.whole
        device = torch.device(shard.device)
        travel = queries_travel(self.config, shard.ranks, shard.length, queries.all_runs, device)
        return TravellingQueries(queries) if travel else queries

    def _run(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        readers: SharedReaders | None,
        angles: Tensor,
        shard: SequenceShard | QueryShard | TravellingQueries,
        before: int = 0,
    ) -> Tensor:
        """`layers` of one half of the model; `before`: how many of it ran before them here."""
        if not len(layers):
            return hidden
        if self.config.recompute_granularity == "full" and self.training:
            inner_fp8 = bool(self.config.fp8) and self.config.fp8_recipe != Fp8Recipe.delayed
            config = self.config
            if before and config.recompute_method == "block":  # the first layers of each half, not of each group
                config = copy.copy(config)
                config.recompute_num_layers -= before
            block = _CheckpointedLayers(layers, config, self.pg_collection, len(layers))
            # The checkpoints only read the shared K,V, which are therefore never recomputed.
            store = AttentionOutputStore(bool(self.config.fp8)) if self.config.keep_cross_attention else None
            inner_readers = readers and readers.inside_checkpoint(store)
            return checkpointed_forward(block, hidden, None, None, None, angles, inner_readers, shard, inner_fp8)
        return self._run_once(layers, hidden, readers, angles, shard)

    def _run_once(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        attention_bias: SharedReaders | list[Tensor] | None,
        angles: Tensor,
        shard: SequenceShard | QueryShard | TravellingQueries,
    ) -> Tensor:
        """`_run` without full recompute."""
        layer: TransformerLayer
        for layer in layers:
            with self._layer_fp8(layer.layer_number - 1):
                hidden, _ = layer(
                    hidden_states=hidden,
                    attention_mask=None,
                    attention_bias=attention_bias,
                    rotary_pos_emb=angles,
                    packed_seq_params=shard,
                )
        return hidden

    def _layer_fp8(self, index: int):
        """The FP8 context of layer `index`: recipes other than delayed scaling are entered layer by layer, because the
        first and last layers may opt out."""
        if self.config.fp8 and self.config.fp8_recipe != Fp8Recipe.delayed:
            return get_fp8_context(self.config, index)
        return nullcontext()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys carry the layer's number in the whole model, so a checkpoint does not depend on the pipeline stages."""
        state: ShardedStateDict = {}
        layer: TransformerLayer
        for index, layer in enumerate(self.layers):
            local, of_model = f"{prefix}layers.{index}.", f"{prefix}layers.{layer.layer_number - 1}."
            part = layer.sharded_state_dict(local, (), metadata)
            replace_prefix_for_sharding(part, local, of_model)
            state.update(part)
        for name in self.kv_names.values():
            module, key = self.get_submodule(name), f"{prefix}{name}."
            state.update(sharded_state_dict_default(module, key, (), metadata, tp_group=self.tp_group))
        return state


@dataclass
class _CheckpointedLayers:
    """The half of a block that runs under full recompute, with the attributes of a TransformerBlock that Megatron's
    `checkpointed_forward` reads. (A TransformerBlock itself builds its own layers and would number them anew.)"""

    layers: nn.ModuleList
    config: YOCOConfig
    pg_collection: ProcessGroupCollection
    num_layers_per_pipeline_rank: int
