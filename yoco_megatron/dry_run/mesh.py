"""Where each rank stands in a mesh, and which ranks differ from all others."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from yoco_megatron.costs.memory import data_parallel_size
from yoco_megatron.costs.stage_time import Parts
from yoco_megatron.utils.errors import require


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank; of a mesh, its sizes."""

    tp: int
    cp: int
    dp: int
    pp: int

    def __str__(self) -> str:
        return " ".join(f"{name.upper()}{value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Mesh:
    """Ranks in Megatron's order: tensor, context, data, pipeline parallelism, the first of them fastest."""

    sizes: Place

    @classmethod
    def from_args(cls, args: Namespace) -> "Mesh":
        """Raises ValueError for another order of ranks."""
        require(not args.use_tp_pp_dp_mapping, "--use-tp-pp-dp-mapping: confirm does not know that order of ranks")
        tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
        return cls(Place(tp, cp, data_parallel_size(args), args.pipeline_model_parallel_size))

    def rank(self, place: Place) -> int:
        """At `place`."""
        rank = 0
        for size, index in reversed(list(zip(astuple(self.sizes), astuple(place)))):
            rank = rank * size + index
        return rank

    def place(self, rank: int) -> Place:
        """Of `rank`."""
        indices = []
        for size in astuple(self.sizes):
            rank, index = divmod(rank, size)
            indices.append(index)
        return Place(*indices)

    def kind(self, group: Sequence[int]) -> str:
        """The dimensions over which a group of ranks extends, such as "cp+dp"; "world" for all ranks."""
        places = [self.place(rank) for rank in group]
        varied = [name for name in vars(self.sizes) if len({getattr(place, name) for place in places}) > 1]
        return "world" if len(group) == len(self) > 1 else "+".join(varied) or "alone"

    @property
    def ranks_of_a_stage(self) -> int:
        """The first rank of each pipeline rank is a multiple of it."""
        return self.sizes.tp * self.sizes.cp * self.sizes.dp

    def __len__(self) -> int:
        return self.ranks_of_a_stage * self.sizes.pp

    def distinct_ranks(self, stages: Sequence[Parts]) -> list[int]:
        """The first rank of each pipeline rank, and its last neighbour in each other dimension.

        Context and data parallelism do the same in pipeline ranks that hold the same; tensor parallelism cuts each
        one's weights, which the checkpoint has to cover.

        Args:
            stages: what each pipeline stage holds, in the order that a micro-batch visits them.
        """
        sizes, found, seen = self.sizes, set(), set()
        for pp in range(sizes.pp):
            found |= {self.rank(Place(tp, 0, 0, pp)) for tp in {0, sizes.tp - 1}}
            content = tuple(tuple(sorted(parts.items())) for parts in stages[pp :: sizes.pp])
            if content not in seen:
                found |= {self.rank(Place(0, sizes.cp - 1, 0, pp)), self.rank(Place(0, 0, sizes.dp - 1, pp))}
                seen.add(content)
        return sorted(found)
