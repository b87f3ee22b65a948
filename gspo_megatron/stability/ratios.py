"""What the importance ratios of a rollout batch say, from one value a sequence.

log s is the mean and log W = T·log s the sum, over the T response tokens of a sequence, of log(new/old probability):
s is GSPO's length-normalised sequence ratio, W the un-normalised importance weight.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

Vector = np.ndarray | Tensor

# Of the fit against length: a bin is half an octave of lengths.
MIN_BIN_SEQUENCES = 8
MIN_BINS = 3


def _vector(values: Vector, dtype: type) -> np.ndarray:
    """A one-dimensional NumPy array."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
    assert array.ndim == 1, f"expected a vector, got shape {array.shape}"
    return array.astype(dtype)


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def clip_fractions(
    clipped: Vector, clipped_tokens: Vector, num_tokens: Vector, advantages: Vector
) -> dict[str, float | None]:
    """Clip fractions over the sequences that could be clipped: a non-zero advantage and at least one response token.

    Args:
        clipped: [S] bool, any response token's term clipped.
        clipped_tokens: [S] response tokens whose term is clipped.
        num_tokens: [S] response tokens.
        advantages: [S]; where advantages differ inside a response, their mean over it.

    Returns:
        clip_fraction_token, clip_fraction_sequence, clip_fraction_positive, clip_fraction_negative (0-1); None where
        nothing is left to count.
    """
    is_clipped, advantage = _vector(clipped, bool), _vector(advantages, float)
    of_clipped, tokens = _vector(clipped_tokens, float), _vector(num_tokens, float)
    sizes = {len(v) for v in (advantage, is_clipped, of_clipped, tokens)}
    assert len(sizes) == 1, f"vectors of different lengths {sorted(sizes)}"
    live = (tokens > 0) & (advantage != 0)
    positive, negative = live & (advantage > 0), live & (advantage < 0)
    return {
        "clip_fraction_token": _share(of_clipped[live].sum(), tokens[live].sum()),
        "clip_fraction_sequence": _share(is_clipped[live].sum(), live.sum()),
        "clip_fraction_positive": _share(is_clipped[positive].sum(), positive.sum()),
        "clip_fraction_negative": _share(is_clipped[negative].sum(), negative.sum()),
    }


def ratio_spread(log_ratio: Vector, num_tokens: Vector, mini_batch: Vector) -> dict[str, float | None]:
    """Quantiles and spread of log s and log W over all sequences with at least one response token: a ratio moves
    whether or not the sequence has a gradient of its own.

    The slopes leave mini-batch 0 out, where no weight has changed and a ratio is rounding alone. A non-finite log ratio
    makes quantiles, deviations and sample sizes NaN; it is not left out.

    Args:
        log_ratio: [S] log s of each sequence, in nats.
        num_tokens: [S] response tokens.
        mini_batch: [S] the optimizer step that each sequence was part of, from 0.

    Returns:
        log_ratio_sequence_p01, _p50, _p99 (linear interpolation), _max_abs, _std, log_weight_sequence_std (nats;
        population deviations), log_ratio_length_slope, log_weight_length_slope (see `length_slope`),
        ess_fraction_sequence, ess_fraction_weight (see `effective_fraction`); None where there is nothing to measure.
    """
    ratio, tokens, step = _vector(log_ratio, float), _vector(num_tokens, float), _vector(mini_batch, int)
    sizes = {len(v) for v in (ratio, tokens, step)}
    assert len(sizes) == 1, f"vectors of different lengths {sorted(sizes)}"
    kept = tokens > 0
    ratio, tokens, step = ratio[kept], tokens[kept], step[kept]
    row: dict[str, float | None] = dict.fromkeys(f"log_ratio_sequence_{k}" for k in ("p01", "p50", "p99", "max_abs"))
    weight, later = tokens * ratio, step > 0
    if ratio.size:
        with np.errstate(invalid="ignore"):  # inf - inf while interpolating is NaN, which is what is reported
            quantiles = np.quantile(ratio, [0.01, 0.5, 0.99])
        row = dict(zip(row, [float(q) for q in quantiles] + [float(np.abs(ratio).max())], strict=True))
    return row | {
        "log_ratio_sequence_std": _deviation(ratio),
        "log_weight_sequence_std": _deviation(weight),
        "log_ratio_length_slope": length_slope(ratio[later], tokens[later], step[later]),
        "log_weight_length_slope": length_slope(weight[later], tokens[later], step[later]),
        "ess_fraction_sequence": effective_fraction(ratio),
        "ess_fraction_weight": effective_fraction(weight),
    }


def _deviation(values: np.ndarray) -> float | None:
    with np.errstate(invalid="ignore"):
        return float(values.std()) if values.size else None


def effective_fraction(log_weights: Vector) -> float | None:
    """(Σ w)² / (N Σ w²) of weights given by their logarithms: 1 if all are equal, 1/N if one outweighs all others.

    Kish's effective sample size over N, taken in log space: weights may be beyond the range of floats. None for N = 0.
    """
    x = _vector(log_weights, float)
    if not x.size:
        return None
    if not np.isfinite(x).all():
        return float("nan")
    w = np.exp(x - x.max())  # between 0 and 1; the common factor cancels
    return float(w.sum() ** 2 / (x.size * np.square(w).sum()))


def length_slope(values: Vector, lengths: Vector, groups: Vector) -> float | None:
    """Slope of log(standard deviation of `values`) against log(length), over bins of length.

    Independent noise of the tokens gives log s a deviation that falls as T^(-1/2), and log W one that rises as T^(1/2).
    A bin is half an octave, floor(2·log2 T). Its deviation is taken about the mean of each group inside the bin, so
    that a drift from one mini-batch to the next is no spread; it has Σ (n_group - 1) degrees of freedom, which are also
    its weight in the least-squares fit. A bin stands at the mean of log T over its values.

    Args:
        values: [S], lengths: [S] at least 1, groups: [S] mini-batch of each.

    Returns:
        None with fewer than MIN_BINS bins of at least MIN_BIN_SEQUENCES values that differ: lengths hardly vary. NaN if
        a value is not finite.
    """
    x, length, group = _vector(values, float), _vector(lengths, float), _vector(groups, int)
    if not np.isfinite(x).all():
        return float("nan")
    number = np.floor(2 * np.log2(length)).astype(int)
    points = []
    for k in np.unique(number):
        inside = number == k
        if inside.sum() < MIN_BIN_SEQUENCES:
            continue
        parts = [x[inside & (group == g)] for g in np.unique(group[inside])]
        freedom = sum(part.size - 1 for part in parts)
        squares = sum(float(np.square(part - part.mean()).sum()) for part in parts)
        if freedom > 0 and squares > 0:
            points.append((np.log(length[inside]).mean(), 0.5 * np.log(squares / freedom), freedom))
    if len(points) < MIN_BINS:
        return None
    at, spread, weight = np.array(points).T
    at, spread = at - np.average(at, weights=weight), spread - np.average(spread, weights=weight)
    return float((weight * at * spread).sum() / (weight * at * at).sum())
