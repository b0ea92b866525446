"""Which layers each pipeline stage holds, and where the shared K,V are.

Stages are counted in the order that a micro-batch visits them: stage g is model chunk g // P of pipeline rank g % P.
Stages may be uneven, and empty at the ends, the split between self- and cross-decoder anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from yoco_megatron.config.kv_sets import layers_of_sets, sets_arriving, source_stages, sources_of
from yoco_megatron.config.memory_units import memory_cuts
from yoco_megatron.utils.errors import require


@dataclass(frozen=True)
class Stage:
    """Layers [first, last) of the model, counted from 0, and what stands before and after them.

    pre_process: holds the embedding; post_process: holds the head.
    kv_sources: of each projection to shared K,V that is held here, the layers of the model before it. kv_in: the sets
    of K,V that arrive with the hidden states; kv_out: those that leave with them; memory_in, memory_out: whether the
    memory of gated memory units does. mtp_layers: of multi-token prediction, behind the head's hidden states.
    """

    first: int
    last: int
    pre_process: bool = True
    post_process: bool = True
    kv_sources: tuple[int, ...] = ()
    kv_in: range = range(0)
    kv_out: range = range(0)
    mtp_layers: int = 0
    memory_in: bool = False
    memory_out: bool = False

    @property
    def receives_shared(self) -> bool:
        """Whether more than hidden states arrives."""
        return bool(self.kv_in) or self.memory_in

    def split(self, split_layer: int) -> tuple[int, int]:
        """(self-decoder layers, cross-decoder layers) held here; `split_layer` is the first of the cross-decoder."""
        n_self = max(0, min(self.last, split_layer) - self.first)
        return n_self, self.last - self.first - n_self

    def is_behind(self, split_layer: int) -> bool:
        """Whether what arrives has passed the self-decoder."""
        return self.first >= split_layer and not self.pre_process

    def parts(self, split_layer: int) -> dict[str, int]:
        """How many of each part of the model it holds, as `costs.stage_time` counts them."""
        n_self, n_cross = self.split(split_layer)
        return {
            "embedding": int(self.pre_process),
            "self_decoder": n_self,
            "shared_kv": len(self.kv_sources),
            "cross_decoder": n_cross,
            "output_layer": int(self.post_process),
        } | ({"mtp": 1} if self.mtp_layers else {})


@dataclass(frozen=True)
class StagePlan:
    """Cuts of a model: stage g holds layers [cuts[g], cuts[g+1]); `split_layer` is the first cross-decoder layer, and
    equal groups of them read one of `kv_sets` each, the last one `mtp_layers` of multi-token prediction, too.
    `kv_sources`: as `config.kv_sets.sources_of` gives them; of none the split. `pattern`: --cross-decoder-pattern;
    `memory_cuts`: as `config.memory_units` has them."""

    cuts: tuple[int, ...]
    split_layer: int
    kv_sets: int = 1
    mtp_layers: int = 0
    kv_sources: tuple[int, ...] = ()
    pattern: str | None = None
    memory_cuts: range = range(0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_sources", self.kv_sources or (self.split_layer,))

    @staticmethod
    def of(config: Any, counts: Iterable[int]) -> "StagePlan":
        """Stages of so many layers each, of the model of a YOCOConfig or a ModelShape."""
        sources, mtp_layers = sources_of(config), config.mtp_num_layers or 0
        cuts = (0, *accumulate(counts))
        kv_sets, pattern = config.shared_kv_sets, config.cross_decoder_pattern
        return StagePlan(
            cuts, config.num_self_decoder_layers, kv_sets, mtp_layers, sources, pattern, memory_cuts(config)
        )

    @property
    def count(self) -> int:
        """Number of stages, over all ranks and chunks."""
        return len(self.cuts) - 1

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.cuts[-1]

    @property
    def kv_reads(self) -> int:
        """Sets of K,V that each stage reads, all stages together."""
        stages = [*pairwise(self.cuts), *[(self.num_layers, self.num_layers + 1)] * self.mtp_layers]  # each reads anew
        return sum(max(of.start, first) < min(of.stop, last) for of in self._layers_of_sets for first, last in stages)

    def kv_arriving(self, g: int) -> range:
        """Sets of K,V in the tensor that enters stage g: those that exist and that a layer from g on reads."""
        return sets_arriving(self.cuts, self.kv_sources, self._layers_of_sets, g)

    def memory_arrives(self, g: int) -> bool:
        """Whether the tensor that enters stage g has the memory: it exists, and a unit from g on reads it."""
        return 0 < g < self.count and self.cuts[g] in self.memory_cuts

    @property
    def _layers_of_sets(self) -> list[range]:
        return layers_of_sets(self.num_layers, self.split_layer, self.kv_sets, self.mtp_layers, self.pattern)

    def stage(self, g: int) -> Stage:
        """What stage g holds."""
        return Stage(
            first=self.cuts[g],
            last=self.cuts[g + 1],
            pre_process=g == 0,
            post_process=g == self.count - 1,
            kv_sources=tuple(
                source
                for source, stage in zip(self.kv_sources, source_stages(self.cuts, self.kv_sources))
                if stage == g
            ),
            kv_in=self.kv_arriving(g),
            kv_out=self.kv_arriving(g + 1),
            mtp_layers=self.mtp_layers if g == self.count - 1 else 0,
            memory_in=self.memory_arrives(g),
            memory_out=self.memory_arrives(g + 1),
        )

    def parts(self) -> list[dict[str, int]]:
        """Of each stage, see `Stage.parts`."""
        return [self.stage(g).parts(self.split_layer) for g in range(self.count)]

    @staticmethod
    def from_config(config: Any) -> "StagePlan":
        """The plan in a YOCOConfig's layout (--pipeline-model-parallel-layout, or the planner's); else one stage."""
        # Here, so that tools/plan.py need not wait for torch.
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        layout = config.pipeline_model_parallel_layout
        if layout is None:
            require(
                config.pipeline_model_parallel_size == 1,
                "--pipeline-model-parallel-size needs cuts: set --pipeline-model-parallel-layout, for example "
                "by yoco_megatron.parallel.pipeline.planner",
            )
            return StagePlan.of(config, [config.num_layers])
        if isinstance(layout, PipelineParallelLayerLayout):
            ranks, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
            rows = [layout.layout[rank][chunk] for chunk in range(chunks) for rank in range(ranks)]
        else:
            rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
        return StagePlan.of(config, [row.count(LayerType.decoder) for row in rows])


def layout_string(counts: list[int], mtp_layers: int = 0) -> str:
    """Megatron's layout string for stages of that many layers: [2, 3] -> 'Ett|tttL', with one of multi-token prediction
    'Ett|tttmL'."""
    stages = ["t" * count for count in counts]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "m" * mtp_layers + "L"
    return "|".join(stages)
