"""Statistics of the ratios against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspo_megatron.metrics import METRICS
from gspo_megatron.stability.ratios import clip_fractions, effective_fraction, length_slope, ratio_spread


def test_clip_fractions_count_what_could_be_clipped() -> None:
    fractions = clip_fractions(
        clipped=torch.tensor([True, False, True, True, True, False]),
        clipped_tokens=torch.tensor([4, 0, 2, 3, 5, 0]),
        num_tokens=torch.tensor([4, 6, 2, 0, 5, 8]),  # the fourth has no response token
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, -2.0]),  # the fifth has no gradient
    )
    assert fractions == {
        "clip_fraction_token": 6 / 20,
        "clip_fraction_sequence": 2 / 4,
        "clip_fraction_positive": 1 / 2,
        "clip_fraction_negative": 1 / 2,
    }
    assert set(fractions) <= set(METRICS)


def test_clip_fractions_are_none_where_nothing_counts() -> None:
    flags, zeros, ones = np.array([False, True]), np.zeros(2), np.ones(2)
    assert set(clip_fractions(flags, ones, ones, zeros).values()) == {None}
    one_sign = clip_fractions(flags, ones, ones, ones)
    assert (one_sign["clip_fraction_positive"], one_sign["clip_fraction_negative"]) == (0.5, None)
    assert set(clip_fractions(flags, zeros, zeros, ones).values()) == {None}
    assert set(clip_fractions(*[np.zeros(0)] * 4).values()) == {None}


def test_spread_of_a_hand_made_batch() -> None:
    row = ratio_spread(
        torch.tensor([0.1, -0.2, 0.3, 9.0, -0.5, 0.0]),
        torch.tensor([4, 6, 2, 0, 5, 8]),  # the fourth has no response token
        torch.zeros(6),
    )
    ratios = np.array([0.1, -0.2, 0.3, -0.5, 0.0], dtype=np.float32).astype(float)
    weights = ratios * [4, 6, 2, 5, 8]
    assert row["log_ratio_sequence_max_abs"] == 0.5
    assert row["log_ratio_sequence_p50"] == 0.0
    # Linear interpolation between order statistics: position q·(n − 1).
    ordered = np.sort(ratios)
    assert row["log_ratio_sequence_p01"] == pytest.approx(ordered[0] + 0.04 * (ordered[1] - ordered[0]))
    assert row["log_ratio_sequence_p99"] == pytest.approx(ordered[3] + 0.96 * (ordered[4] - ordered[3]))
    assert row["log_ratio_sequence_std"] == pytest.approx(np.sqrt(np.mean(ratios**2) - ratios.mean() ** 2))
    assert row["log_weight_sequence_std"] == pytest.approx(np.sqrt(np.mean(weights**2) - weights.mean() ** 2))
    for key, logs in (("ess_fraction_sequence", ratios), ("ess_fraction_weight", weights)):
        assert row[key] == pytest.approx(np.exp(logs).sum() ** 2 / (5 * np.exp(2 * logs).sum()))
    assert row["log_ratio_length_slope"] is row["log_weight_length_slope"] is None
    assert set(row) <= set(METRICS)


@pytest.mark.parametrize("tokens", [[], [0, 0]])
def test_spread_is_none_where_nothing_counts(tokens: list[int]) -> None:
    assert set(ratio_spread(np.ones(len(tokens)), np.array(tokens), np.ones(len(tokens))).values()) == {None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_spread_does_not_hide_non_finite_ratios(bad: float) -> None:
    row = ratio_spread(np.array([bad, 0.0]), np.ones(2), np.ones(2))
    for key in ("log_ratio_sequence_max_abs", "log_ratio_sequence_std", "log_weight_sequence_std"):
        assert not math.isfinite(row[key] or 0), key
    for key in ("ess_fraction_sequence", "ess_fraction_weight", "log_ratio_length_slope", "log_weight_length_slope"):
        assert math.isnan(row[key] or 0), key


def test_vectors_that_do_not_match_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"different lengths \[2, 3\]"):
        clip_fractions(np.zeros(3), np.zeros(2), np.zeros(2), np.zeros(2))
    with pytest.raises(AssertionError, match=r"different lengths \[2, 3\]"):
        ratio_spread(np.zeros(3), np.zeros(2), np.zeros(2))


@pytest.mark.filterwarnings("error")
def test_effective_fraction() -> None:
    assert effective_fraction(np.full(7, 3.0)) == pytest.approx(1.0)
    assert effective_fraction(np.log([1.0, 3.0])) == pytest.approx(16 / (2 * 10))
    assert effective_fraction(np.array([0.0, 5000.0, 0.0, 0.0])) == pytest.approx(1 / 4), "e^5000 is no float"
    assert effective_fraction(np.array([-9000.0, -9000.0])) == pytest.approx(1.0)
    assert effective_fraction(np.zeros(0)) is None


def token_noise(lengths: np.ndarray, seed: int) -> np.ndarray:
    """log s of sequences whose tokens' log ratios are independent."""
    generator = np.random.default_rng(seed)
    return np.array([0.1 * generator.standard_normal(n).mean() for n in lengths])


def test_noise_spreads_log_s_as_the_inverse_root_of_length() -> None:
    lengths = np.random.default_rng(1).integers(8, 512, 4000)
    log_s = token_noise(lengths, 2)
    steps = np.arange(4000) % 3 + 1
    row = ratio_spread(log_s, lengths, steps)
    assert row["log_ratio_length_slope"] == pytest.approx(-0.5, abs=0.05)
    assert row["log_weight_length_slope"] == pytest.approx(0.5, abs=0.05)
    # Mini-batch 0 holds rounding alone, and a drift from one mini-batch to the next is no spread.
    drifted = np.concatenate([np.zeros(4000), log_s + 0.2 * steps])
    row = ratio_spread(drifted, np.tile(lengths, 2), np.concatenate([np.zeros(4000), steps]))
    assert row["log_ratio_length_slope"] == pytest.approx(-0.5, abs=0.05)


def test_the_slope_equals_a_weighted_fit() -> None:
    lengths = np.repeat([4, 6, 9, 16, 100], [8, 9, 20, 10, 7])  # the last bin is too small
    values = token_noise(lengths, 5)
    groups = np.arange(lengths.size) % 2
    points, degrees = [], []
    for n in (4, 6, 9, 16):
        parts = [values[(lengths == n) & (groups == g)] for g in (0, 1)]
        degrees.append(sum(len(p) - 1 for p in parts))
        points.append((math.log(n), 0.5 * math.log(sum(p.var() * len(p) for p in parts) / degrees[-1])))
    x, y = np.array(points).T
    expected = np.polyfit(x, y, 1, w=np.sqrt(degrees))[0]
    assert length_slope(values, lengths, groups) == pytest.approx(expected, rel=1e-9)


def test_no_slope_where_lengths_hardly_vary() -> None:
    lengths = np.repeat([8, 9], 100)
    assert length_slope(token_noise(lengths, 1), lengths, np.zeros(200)) is None
    varied = np.repeat([4, 8, 16, 32], 20)
    assert length_slope(np.zeros(80), varied, np.zeros(80)) is None, "no spread at all"
    assert length_slope(np.zeros(0), np.zeros(0), np.zeros(0)) is None
