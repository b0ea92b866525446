"""How GPUs share a run: from a mesh's name in the field's spelling to the flags of pretrain_yoco.py."""

import argparse
import re
from dataclasses import dataclass

FORM = "expected sizes above 1 joined by x, such as DP8, TP2xPP2xDP2, CP4 or EP2, or 1 for one GPU"


@dataclass(frozen=True)
class Mesh:
    """Sizes of tensor, pipeline, context and data parallelism; `vp` model chunks on each pipeline rank, experts
    divided over `ep` of the `dp` data-parallel ranks."""

    name: str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        """Of the whole mesh."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def flags(self) -> str:
        """The same for all models; data parallelism takes what is left of the GPUs. TP is with sequence parallelism."""
        return " ".join(
            flag
            for size, flag in (
                (self.tp, f"--tensor-model-parallel-size {self.tp} --sequence-parallel"),
                (self.pp, f"--pipeline-model-parallel-size {self.pp}"),
                (self.vp, f"--num-virtual-stages-per-pipeline-rank {self.vp}"),
                (self.ep, f"--expert-model-parallel-size {self.ep}"),
                (self.cp, f"--context-parallel-size {self.cp}"),
            )
            if size > 1
        )

    @staticmethod
    def of(name: str) -> "Mesh":
        """`PP2xTP2xDP2 VP2` in any order, the interleaving last. EP2 is DP2 whose ranks divide the experts; DP2xEP2 is
        two of them.

        Raises:
            argparse.ArgumentTypeError: a name that is no mesh.
        """
        if name == "1":
            return Mesh(name)
        sizes: dict[str, int] = {}
        sharing, *interleaving = name.split(" ")
        for part in (*sharing.split("x"), *interleaving):
            known = re.fullmatch(
                r"(VP)([2-9]|[1-9]\d+)" if part in interleaving else r"([TPCDE]P)([2-9]|[1-9]\d+)", part
            )
            if known is None or known[1].lower() in sizes:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no mesh: {part!r} {'again' if known else 'in it'}; {FORM}"
                )
            sizes[known[1].lower()] = int(known[2])
        if "vp" in sizes and "pp" not in sizes:
            raise argparse.ArgumentTypeError(f"{name!r} is no mesh: VP{sizes['vp']} interleaves a pipeline, add PP2")
        if "ep" in sizes:
            sizes["dp"] = sizes.get("dp", 1) * sizes["ep"]
        return Mesh(name, **sizes)
