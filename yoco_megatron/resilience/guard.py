"""The divergence guard: steps whose gradient norm is not finite, or far above the usual, do not change the weights.

Megatron brings the norm of the whole gradient to the host in each step anyway, to clip by it, and then can skip the
update when the norm is above a number (`grad_norm_skip_threshold`). The guard supplies that number: k standard
deviations above the mean of the recent good norms. All ranks decide alike, and it needs no synchronisation.

After several bad steps in a row, skipping does not help: the run rolls back to the last checkpoint and skips all
batches from there to the last bad one, as PaLM was trained (arXiv 2204.02311, section 5.1).
"""

import math
import statistics
import sys
from collections import deque
from typing import TypedDict

MINIMUM = 16  # good norms before the statistics are used; until then only non-finite norms are skipped
LEAST_WINDOW = 8  # norms from which a deviation can be told at all
# Least deviation, as a share of the mean: with norms that hardly vary everything would be an outlier.
RELATIVE_FLOOR = 0.05


class GuardState(TypedDict):
    """What a checkpoint holds of it, as JSON."""

    norms: list[float]
    bad_in_a_row: int


class Guard:
    """Norms of recent good steps, and the threshold that follows from them.

    Args:
        sigmas: standard deviations above the mean.
        window: good steps in the statistics.
        patience: bad steps in a row after which to roll back.
    """

    def __init__(self, sigmas: float, window: int, patience: int) -> None:
        self.sigmas, self.window, self.patience = sigmas, window, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.bad_in_a_row = 0

    def threshold(self) -> float:
        """Gradient norm above which a step is skipped; finite, so that infinity is above it."""
        if len(self.norms) < min(MINIMUM, self.window):
            return sys.float_info.max
        mean = statistics.fmean(self.norms)
        above = self.sigmas * max(statistics.pstdev(self.norms, mean), RELATIVE_FLOOR * mean)
        return min(mean + above, sys.float_info.max)

    def observe(self, norm: float) -> bool:
        """Record the norm of a step; returns whether the step was bad.

        A gradient of zero, as of a batch without a token that counts, is neither bad nor says what is usual.
        """
        if norm == 0:
            return False
        bad = not math.isfinite(norm) or norm > self.threshold()
        if bad:
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row = 0
            self.norms.append(norm)
        return bad

    @property
    def diverged(self) -> bool:
        """True after `patience` bad steps in a row."""
        return self.bad_in_a_row >= self.patience

    def state(self) -> GuardState:
        """State with which a resumed run decides as the undisturbed one would; JSON."""
        return {"norms": list(self.norms), "bad_in_a_row": self.bad_in_a_row}

    def load_state(self, state: GuardState) -> None:
        """Restore what `state` returned."""
        self.norms.clear()
        self.norms.extend(norm for norm in state["norms"] if math.isfinite(norm) and norm > 0)
        self.bad_in_a_row = state["bad_in_a_row"]
