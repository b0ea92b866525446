"""What a check of gradients found, as text."""

import re
from collections.abc import Sequence

from yoco_megatron.gradient_check.check import TOLERANCE, Difference
from yoco_megatron.utils.text_table import aligned


def report(found: Sequence[Difference], mesh: str) -> str:
    """A line for each kind of parameter, all layers in one; then the first that differs, if any does."""
    kinds: dict[str, list[Difference]] = {}
    for one in found:
        kinds.setdefault(re.sub(r"\b(layers|experts)\.\d+", r"\1.*", one.name), []).append(one)
    rows = [("parameter", "tensors", "largest difference", "of", "wrong")]
    for kind, alike in kinds.items():
        worst = max(alike, key=lambda one: float("inf") if one.error != one.error else one.error)
        where = "" if len(alike) == 1 else _numbers(worst.name)
        count = sum(one.is_wrong for one in alike)
        rows.append((kind, str(len(alike)), f"{worst.error:.1e}", where, str(count or "")))
    wrong = [one for one in found if one.is_wrong]
    if wrong:
        first = wrong[0]
        end = (
            f"{len(wrong)} of {len(found)} differ by more than {TOLERANCE:g}. The first in the forward pass: "
            f"{first.name} {list(first.shape)}, by {first.error:.1e} on rank {first.rank}"
        )
    else:
        end = f"all {len(found)} agree within {TOLERANCE:g}: {mesh} trains the model of one process"
    return f"{aligned(rows)}\n\n{end}"


def _numbers(name: str) -> str:
    return " ".join(f"{kind[:-1]} {number}" for kind, number in re.findall(r"\b(layers|experts)\.(\d+)", name))
