"""Figures computed from a run's recorded metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def measured(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The key's values over the rows that have one, in order."""
    return [float(row[key]) for row in rows if row.get(key) is not None]


def first_last_means(rows: Sequence[Mapping[str, Any]], key: str, n: int = 5) -> tuple[float, float] | None:
    """Mean of the key over the first n and over the last n rows that have it.

    None with fewer than 2n such rows, where the two would share batches.
    """
    values = measured(rows, key)
    if len(values) < 2 * n:
        return None
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def last_list_means(rows: Sequence[Mapping[str, Any]], key: str, n: int = 5) -> list[float | None] | None:
    """Mean of each place of a metric of several numbers over the last n rows that have it.

    None in a place that none of them has, and altogether without such rows. Rows of another length than the last are
    left out: their places are others'.
    """
    lists = [row[key] for row in rows if row.get(key) is not None][-n:]
    if not lists:
        return None
    places = zip(*(values for values in lists if len(values) == len(lists[-1])), strict=True)
    known = [[float(x) for x in values if x is not None] for values in places]
    return [float(np.mean(values)) if values else None for values in known]


def first_last_gain(rows: Sequence[Mapping[str, Any]], n: int = 5) -> float | None:
    """Mean reward of the last n rollout batches minus that of the first n.

    Rows without a measured `reward_mean` (evaluation before training) are no batches. None with fewer than 2n batches.

    Args:
        rows: objects of metrics.jsonl, in order.
    """
    means = first_last_means(rows, "reward_mean", n)
    return None if means is None else means[1] - means[0]


def smoothing_window(num_values: int) -> int:
    """An odd number of batches, about a tenth of the run, from 1 (very short runs) to 25."""
    if num_values < 10:
        return 1
    return min(25, num_values // 10 | 1)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean, [n] to [n], over the measured values of a window that is cut off at both ends.

    What was not measured (NaN) stays so: a mean must not show a batch that is not there.
    """
    assert window % 2 == 1, f"a centred window is odd, not {window}"
    known = np.isfinite(values)
    kernel = np.ones(window)
    # numpy's "same" returns the longer of the two inputs; "full" cut to the middle is right for short runs too.
    half = window // 2
    totals = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(known.astype(float), kernel)[half : half + len(values)]
    return np.where(known, totals / np.maximum(counts, 1), np.nan)


def clip_band(config: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The run's clip as bounds of a log ratio, (log(1 - clip_low), log(1 + clip_high)), in nats.

    None where the config does not give both values.
    """
    algorithm = (config or {}).get("algorithm", {})
    low, high = algorithm.get("clip_low"), algorithm.get("clip_high")
    if low is None or high is None:
        return None
    return math.log1p(-low), math.log1p(high)


COLLAPSED = 0.5  # of the best reward


class Collapse:
    """Collapse, as rewards arrive: each of the last `batches` is under half of the best mean of as many in a row."""

    def __init__(self, batches: int) -> None:
        self.batches, self.count = batches, 0
        self.last: list[float] = []
        self.best = -math.inf

    def add(self, reward: float) -> None:
        """Take up the next batch's reward."""
        self.count += 1
        self.last = [*self.last, reward][-self.batches :]
        if len(self.last) == self.batches:
            self.best = max(self.best, math.fsum(self.last) / self.batches)

    @property
    def collapsed_from(self) -> float | None:
        """That best mean, if the reward has collapsed; None if not, or with fewer than twice as many rewards."""
        if self.count < 2 * self.batches:
            return None
        return self.best if max(self.last) < COLLAPSED * self.best else None


def has_collapsed(rewards: Iterable[float], batches: int) -> bool:
    """Whether the reward was collapsed at any time, also if it came back later."""
    collapse = Collapse(batches)
    for reward in rewards:
        collapse.add(reward)
        if collapse.collapsed_from is not None:
            return True
    return False
