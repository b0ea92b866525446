"""The divergence guard: a step whose gradient is not finite, or far larger than usual, does not change the weights.

Megatron brings the norm of the whole gradient to the host in each step anyway, to clip by it, and then can skip the
update when the norm is above a number (`grad_norm_skip_threshold`). The guard supplies that number: k standard
deviations above the mean of the recent good norms. So all processes decide alike and nothing is synchronised for it.

After several bad steps in a row skipping does not help. Then the run goes back to the checkpoint before them and leaves
out all batches from there to the last bad one, as PaLM was trained (arXiv 2204.02311, section 5.1).
"""

import math
import statistics
import sys
from collections import deque
from typing import Any

MINIMUM = 16  # good norms before the mean means something; until then only what is not finite is skipped
RELATIVE_FLOOR = 0.05  # norms that hardly vary would make everything an outlier


class Guard:
    """Norms of good steps, and the number above which the next is bad.

    Args:
        sigmas: k above.
        window: good steps that are remembered.
        patience: bad steps in a row after which to roll back.
    """

    def __init__(self, sigmas: float, window: int, patience: int) -> None:
        self.sigmas, self.patience = sigmas, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.bad_in_a_row = 0

    def threshold(self) -> float:
        """The largest good norm; always finite, so that an infinite norm is above it."""
        if len(self.norms) < min(MINIMUM, self.norms.maxlen or MINIMUM):
            return sys.float_info.max
        mean = statistics.fmean(self.norms)
        return mean + self.sigmas * max(statistics.pstdev(self.norms, mean), RELATIVE_FLOOR * mean)

    def observe(self, norm: float) -> bool:
        """Take note of a step's norm; whether it was bad."""
        bad = not math.isfinite(norm) or norm > self.threshold()
        if bad:
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row = 0
            self.norms.append(norm)
        return bad

    @property
    def diverged(self) -> bool:
        return self.bad_in_a_row >= self.patience

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide as the undisturbed one would."""
        return {"norms": list(self.norms), "bad_in_a_row": self.bad_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.norms.extend(state["norms"])
        self.bad_in_a_row = state["bad_in_a_row"]


def prepare(optimizer: Any, threshold: float) -> None:
    """Have Megatron's `ChainedOptimizer` skip the next update if the norm is above `threshold` or not a number."""
    for one in optimizer.chained_optimizers:
        one.config.grad_norm_skip_threshold = threshold
    if "get_grad_norm" not in vars(optimizer):
        get_grad_norm = optimizer.get_grad_norm

        def not_nan() -> float:
            norm = get_grad_norm()
            return math.inf if math.isnan(norm) else norm  # no comparison with NaN is true

        optimizer.get_grad_norm = not_nan
