"""Every collective, send and receive of a rank, in order, and the FLOPs of its matrix products."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Where the tensor that all members hold together is the second argument; elsewhere it is the first.
REDUCED_TO_A_PART = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
POINT_TO_POINT = {"send": "send", "recv_": "receive", "recv_any_source_": "receive"}
# Attention is left out: the kernels of a CPU compute masked scores too.
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


@dataclass(frozen=True)
class Call:
    """A collective with all of `group`, or a send to or a receive from `group`, which is then the two ranks.

    bytes: of the whole tensor: the gathered one of an all-gather, the one before a reduce-scatter.
    """

    phase: str
    name: str
    group: tuple[int, ...]
    bytes: int
    dtype: str

    @property
    def is_point_to_point(self) -> bool:
        return self.name in POINT_TO_POINT.values()

    def __str__(self) -> str:
        return f"{self.name} of {self.bytes:,} bytes ({self.dtype}) among ranks {_short(self.group)} in {self.phase}"


def _short(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


class Ledger(TorchDispatchMode):
    """Calls and FLOPs while it is entered, by `phase`, which whoever enters it sets."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "set-up"
        self.calls: list[Call] = []
        self.product_flops: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace == "c10d":
            self._enter(name, function, args, kwargs)
            return self.exchange(function, args, kwargs)
        result = function(*args, **kwargs)
        if function._overloadpacket in PRODUCTS:
            left, right = [one for one in args if isinstance(one, torch.Tensor)][-2:]
            self.product_flops[self.phase] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result

    def exchange(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator of torch.distributed."""
        return function(*args, **kwargs)

    def add_objects(self, name: str, group: dist.ProcessGroup | None) -> None:
        """Enter a call that exchanges pickled objects, whose size the ledger does not follow."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.calls.append(Call(self.phase, name, tuple(ranks), 0, "object"))

    def _enter(self, name: str, function: Any, args: tuple, kwargs: dict) -> None:
        given = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(given["process_group"])))
        whole = args[1] if name in REDUCED_TO_A_PART else args[0]
        tensors = [leaf for leaf in tree_leaves(whole) if isinstance(leaf, torch.Tensor)]
        if name in POINT_TO_POINT:
            peer = ranks[given["dst" if name == "send" else "src"]]
            name, ranks = POINT_TO_POINT[name], (dist.get_rank(), peer)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        self.calls.append(Call(self.phase, name.strip("_"), ranks, sum(one.nbytes for one in tensors), dtype))
