"""Every collective, send and receive of a rank, in order, the FLOPs of its products and attention, its live bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_megatron.dry_run.live_bytes import LiveBytes

# Where the tensor that all members hold together is the second argument; elsewhere it is the first.
REDUCED_TO_A_PART = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
POINT_TO_POINT = {"send": "send", "recv_": "receive", "recv_any_source_": "receive"}
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
# cuDNN's (ops/attention/partial.py), and how many products each is worth. A CPU's kernels compute masked scores, too.
PARTS_OF_ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention: 1,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: 2,
}
_entered: list["Ledger"] = []


def count_flops(kind: str, flops: float) -> None:
    """Count what a stand-in does not compute, in the ledgers that are entered."""
    for ledger in _entered:
        ledger.count(kind, flops)


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
    """Calls, FLOPs and live bytes while it is entered, by `phase`, which whoever enters it sets.

    Attributes:
        flops: {(phase, "products" or "attention"): FLOPs}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "set-up"
        self.calls: list[Call] = []
        self.flops: Counter[tuple[str, str]] = Counter()
        self.live = LiveBytes()

    def __enter__(self) -> "Ledger":
        _entered.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _entered.remove(self)
        super().__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = function._schema.name.split("::")
        if namespace == "c10d":
            self._enter(name, function, args, kwargs)
            return self.exchange(function, args, kwargs)
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.live.see(leaf)
        packet = function._overloadpacket
        if packet in PRODUCTS:
            left, right = [one for one in args if isinstance(one, torch.Tensor)][-2:]
            self.count("products", 2 * left.shape[0] * left.shape[1] * right.shape[1])
        elif packet in PARTS_OF_ATTENTION:
            given = _named(function, args, kwargs)
            query, keys = given["query"], given["key"].shape[-2]
            visible = (keys + 1) / 2 if given.get("is_causal") else keys
            self.count("attention", PARTS_OF_ATTENTION[packet] * 4 * query.numel() * visible)
        return result

    def count(self, kind: str, flops: float) -> None:
        """Add FLOPs of "products" with weights or of "attention"."""
        self.flops[self.phase, kind] += round(flops)

    def exchange(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator of torch.distributed."""
        return function(*args, **kwargs)

    def add_objects(self, name: str, group: dist.ProcessGroup | None) -> None:
        """Enter a call that exchanges pickled objects, whose size the ledger does not follow."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.calls.append(Call(self.phase, name, tuple(ranks), 0, "object"))

    def _enter(self, name: str, function: Any, args: tuple, kwargs: dict) -> None:
        given = _named(function, args, kwargs)
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(given["process_group"])))
        whole = args[1] if name in REDUCED_TO_A_PART else args[0]
        tensors = [leaf for leaf in tree_leaves(whole) if isinstance(leaf, torch.Tensor)]
        if name in POINT_TO_POINT:
            peer = ranks[given["dst" if name == "send" else "src"]]
            name, ranks = POINT_TO_POINT[name], (dist.get_rank(), peer)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        self.calls.append(Call(self.phase, name.strip("_"), ranks, sum(one.nbytes for one in tensors), dtype))


def _named(function: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
