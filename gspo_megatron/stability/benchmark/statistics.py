"""Statistics over few seeds, where the honest answer is often that nothing can be concluded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, 97.5 % quantile, by degrees of freedom from 1 (any table, e.g. NIST/SEMATECH e-Handbook 1.3.6.7.2).
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
_Z975 = 1.959964
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. With one seed there is no interval: it is infinite."""

    mean: float
    low: float
    high: float
    num_seeds: int


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: from a table up to 20 degrees of freedom, beyond by Cornish and Fisher's
    expansion to 1/degrees² (error below 1e-4)."""
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95 % interval: mean ± t(n-1)·s/√n.

    The percentile bootstrap of three values can't reach beyond their range and covers some 75 % of means: for
    verdicts, the t interval is used.
    """
    x = np.asarray(values, dtype=float)
    assert x.size > 0
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = t_quantile(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(mean, mean - half, mean + half, x.size)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927); never of width 0: 0 of 3 may still be 0.56."""
    z2 = _Z975**2
    middle = (count + z2 / 2) / (total + z2)
    half = _Z975 / (total + z2) * math.sqrt(count * (total - count) / total + z2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_difference(counts: tuple[int, int], total: int) -> Estimate:
    """Difference of two shares with Newcombe's hybrid score interval (1998, method 10), which takes the two as
    independent: wider than needed where seeds pair them."""
    p, q = counts[0] / total, counts[1] / total
    (p_low, p_high), (q_low, q_high) = (share_interval(count, total) for count in counts)
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return Estimate(p - q, low, high, total)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the exact paired permutation test: share of the 2^n assignments of signs whose |mean| is at least
    the observed one. At best 2/2^n: 0.25 with 3 seeds, 0.0625 with 5; below 0.05 only from 6 on."""
    x = np.asarray(differences, dtype=float)
    assert 0 < x.size <= 20, "2^n assignments are enumerated"
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=x.size)))
    means = np.abs(signs @ x)
    return float((means >= abs(x.sum()) * (1 - 1e-12)).mean())


def smallest_p(num_seeds: int) -> float:
    """The least p that `sign_flip_p` can give."""
    return min(1.0, 2.0 / 2**num_seeds)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    assert a.size == b.size >= 2 and np.ptp(a) > 0
    a = a - a.mean()
    return float(a @ (b - b.mean()) / (a @ a))


def bootstrap_band(curves: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise 95 % percentile bootstrap band of the mean curve over seeds.

    Args:
        curves: [seeds, points]; NaN where a seed has no value.
        seed: of the resampling.

    Returns:
        low, high: [points]. With three seeds the band is little more than the seeds' range, and narrower than a t
        interval: it shows spread, verdicts don't use it.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, curves.shape[0], size=(RESAMPLES, curves.shape[0]))
    known = np.isfinite(curves)
    sums = np.where(known, curves, 0.0)[chosen].sum(1)
    counts = known[chosen].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    empty = ~known.any(0)
    means[:, empty] = 0.0
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    low[empty] = high[empty] = np.nan
    return low, high
