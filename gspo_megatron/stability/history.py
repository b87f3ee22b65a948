"""What a run's rows of metrics have said so far, kept up to date as they arrive."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any

from gspo_megatron.stability.quantities import Collapse

Row = Mapping[str, Any]


def value_of(row: Row, key: str) -> float | None:
    """A finite number, or None."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


class History:
    """The rows of trained batches, and figures over all of them: one more row costs no more for a long run."""

    def __init__(self, window: int) -> None:
        """`window`: batches that a collapse takes, and that a share of clipped responses is a mean over."""
        self.window = window
        self.rows: list[Row] = []
        self.first_mismatch: float | None = None  # the first kl_rollout_trainer that was measured
        self.largest_rate: float | None = None  # learning rate
        self.reward = Collapse(window)
        self.most_clipped = 0.0  # largest mean of clip_fraction_sequence over `window` rows
        self._norms: list[float] = []  # grad_norm of the rows that have a gradient, sorted
        self.norms_before: tuple[int, float] = (0, math.nan)  # their number and median without the last row

    def add(self, row: Row) -> None:
        """Take up a row; one without a trained batch, such as the evaluation before the first, is no history."""
        if (row.get("step") or 0) <= 0:
            return
        self.rows.append(row)
        if self.first_mismatch is None:
            self.first_mismatch = value_of(row, "kl_rollout_trainer")
        rate = value_of(row, "learning_rate")
        if rate is not None:
            self.largest_rate = max(rate, self.largest_rate or 0.0)
        reward = value_of(row, "reward_mean")
        if reward is not None:
            self.reward.add(reward)
        if (clipped := self.last("clip_fraction_sequence", self.window)) is not None:
            self.most_clipped = max(self.most_clipped, math.fsum(clipped) / self.window)
        self.norms_before = self.norms
        if norm := value_of(row, "grad_norm"):
            bisect.insort(self._norms, norm)

    @property
    def norms(self) -> tuple[int, float]:
        """Number and median of the gradient norms; those that are 0, of batches without a gradient, are left out."""
        n = len(self._norms)
        return n, (self._norms[(n - 1) // 2] + self._norms[n // 2]) / 2 if n else math.nan

    def last(self, key: str, count: int) -> list[float] | None:
        """The values of the last `count` rows, if they all have one."""
        values = [x for row in self.rows[-count:] if (x := value_of(row, key)) is not None]
        return values if len(values) == count else None
