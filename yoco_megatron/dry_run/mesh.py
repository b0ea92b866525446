"""Where each rank stands in a mesh, and which ranks differ from all others."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import prod

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
    """Ranks in Megatron's order: tensor, context, data, pipeline parallelism, the first of them fastest.

    For experts those of a pipeline rank are ordered anew: `expert_tp` ranks share an expert, `ep` such groups share all
    experts, and the rest are replicas.
    """

    sizes: Place
    expert_tp: int = 1
    ep: int = 1

    @classmethod
    def from_args(cls, args: Namespace) -> "Mesh":
        """Raises ValueError for another order of ranks."""
        require(not args.use_tp_pp_dp_mapping, "--use-tp-pp-dp-mapping: confirm does not know that order of ranks")
        tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
        sizes = Place(tp, cp, data_parallel_size(args), args.pipeline_model_parallel_size)
        if args.num_experts is None:
            return cls(sizes)
        return cls(sizes, args.expert_tensor_parallel_size or tp, args.expert_model_parallel_size)

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

    def expert_rank(self, pp: int, expert_tp: int, ep: int) -> int:
        """Of the first replica of a pipeline rank's experts."""
        return pp * self.ranks_of_a_stage + ep * self.expert_tp + expert_tp

    def kind(self, group: Sequence[int]) -> str:
        """The dimensions over which a group of ranks extends, such as "cp+dp", or among experts "ep+edp"; "world" for
        all ranks."""
        if len(group) == len(self) > 1:
            return "world"
        sizes = vars(self.sizes)
        varied = _varied([vars(self.place(rank)) for rank in group])
        if self.ep * self.expert_tp > 1 and len(group) < prod(sizes[name] for name in varied):
            varied = _varied([self._expert_place(rank) for rank in group])
        return "+".join(varied) or "alone"

    def _expert_place(self, rank: int) -> dict[str, int]:
        replica, in_replica = divmod(rank % self.ranks_of_a_stage, self.expert_tp * self.ep)
        ep, expert_tp = divmod(in_replica, self.expert_tp)
        return {"etp": expert_tp, "ep": ep, "edp": replica, "pp": rank // self.ranks_of_a_stage}

    @property
    def ranks_of_a_stage(self) -> int:
        """The first rank of each pipeline rank is a multiple of it."""
        return self.sizes.tp * self.sizes.cp * self.sizes.dp

    def __len__(self) -> int:
        return self.ranks_of_a_stage * self.sizes.pp

    def distinct_ranks(self, stages: Sequence[Parts]) -> list[int]:
        """The first rank of each pipeline rank, and its last neighbour in each other dimension.

        Context and data parallelism do the same in pipeline ranks that hold the same; tensor and expert parallelism cut
        each one's weights, which the checkpoint has to cover.

        Args:
            stages: what each pipeline stage holds, in the order that a micro-batch visits them.
        """
        sizes, found, seen = self.sizes, set(), set()
        for pp in range(sizes.pp):
            found |= {self.rank(Place(tp, 0, 0, pp)) for tp in {0, sizes.tp - 1}}
            found |= {self.expert_rank(pp, self.expert_tp - 1, 0), self.expert_rank(pp, 0, self.ep - 1)}
            content = tuple(tuple(sorted(parts.items())) for parts in stages[pp :: sizes.pp])
            if content not in seen:
                found |= {self.rank(Place(0, sizes.cp - 1, 0, pp)), self.rank(Place(0, 0, sizes.dp - 1, pp))}
                seen.add(content)
        return sorted(found)


def _varied(places: Sequence[dict[str, int]]) -> list[str]:
    return [name for name in places[0] if len({place[name] for place in places}) > 1]
