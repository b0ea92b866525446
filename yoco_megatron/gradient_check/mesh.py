"""Meshes by the short names of their parts."""

import re

SIZES = {
    "TP": "tensor-model-parallel-size",
    "PP": "pipeline-model-parallel-size",
    "VP": "num-virtual-stages-per-pipeline-rank",
    "CP": "context-parallel-size",
    "EP": "expert-model-parallel-size",
    "ETP": "expert-tensor-parallel-size",
}


def mesh_flags(words: list[str]) -> tuple[list[str], int | None]:
    """(flags of pretrain_yoco.py, data-parallel ranks if they are named) of TP2, SP, PP2, VP2, CP2, EP2, ETP1, DP2."""
    found, data_parallel = [], None
    seen: set[str] = set()
    for word in words:
        parts = re.fullmatch("([A-Z]+)([1-9][0-9]{0,3})?", word.upper())
        name, number = (parts[1], parts[2]) if parts else ("", None)
        if name in seen:
            raise ValueError(f"--mesh {' '.join(words)}: {name} stands there twice")
        seen.add(name)
        if name == "SP" and not number:
            found.append("--sequence-parallel")
        elif name == "DP" and number:
            data_parallel = int(number)
        elif name in SIZES and number:
            found.append(f"--{SIZES[name]}={number}")
        else:
            raise ValueError(f"--mesh {word}: use {', '.join(f'{name}2' for name in SIZES)}, DP2 and SP")
    if "SP" in seen and "TP" not in seen:
        raise ValueError(f"--mesh {' '.join(words)}: SP is a part of tensor parallelism: add TP2")
    return found, data_parallel
