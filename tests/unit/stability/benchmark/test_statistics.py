"""Statistics over seeds, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_megatron.stability.benchmark.clip_model import clip_rates, normal_clip_rates
from gspo_megatron.stability.benchmark.measurements import clip_by_sign, length_scaling, ratio_change
from gspo_megatron.stability.benchmark.results import number
from gspo_megatron.stability.benchmark.statistics import (
    bootstrap_band,
    mean_interval,
    share_difference,
    share_interval,
    sign_flip_p,
    slope,
    smallest_p,
    t_quantile,
)
from gspo_megatron.stability.quantities import Collapse, has_collapsed
from tests.unit.stability.benchmark.benchmark_setup import result

# KL a token -> clipped shares in percent, A > 0 and A < 0, at 4,096 tokens and the paper's clip: simulated.
TABLE = {3e-5: (0, 1), 1e-4: (1, 19), 3e-4: (3, 51), 7.5e-4: (3, 78), 1.5e-3: (1, 92)}


def test_student_interval_of_three_seeds() -> None:
    estimate = mean_interval([1.0, 2.0, 3.0])  # standard deviation 1
    assert estimate.mean == 2.0
    assert estimate.high - estimate.mean == pytest.approx(4.303 / math.sqrt(3))
    assert estimate.mean - estimate.low == pytest.approx(4.303 / math.sqrt(3))


def test_one_seed_has_no_interval() -> None:
    estimate = mean_interval([0.7])
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(("degrees", "value"), [(2, 4.303), (20, 2.086), (30, 2.0423), (120, 1.9799)])
def test_student_quantiles(degrees: int, value: float) -> None:
    assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)


def test_sign_flips_are_counted_exactly() -> None:
    # Of 8 sign assignments of (1, 2, 3) only +++ and --- reach a sum of 6.
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    # (3, -1): |2|; sums of the four assignments: 2, 4, -4, -2: all reach 2.
    assert sign_flip_p([3, -1]) == 1.0
    assert sign_flip_p([0.1] * 6) == 2 / 64
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0, "no difference is no evidence"
    assert smallest_p(3) == 0.25 and smallest_p(5) > 0.05 > smallest_p(6)


def test_intervals_of_shares() -> None:
    # Wilson's interval of 0 of 3 ends at z²/(3 + z²); of 3 of 3 it begins at 3/(3 + z²).
    z2 = 1.959964**2
    assert share_interval(0, 3) == pytest.approx((0.0, z2 / (3 + z2)))
    assert share_interval(3, 3) == pytest.approx((3 / (3 + z2), 1.0))
    # 5 of 10 against 1 of 10: the distances of both shares to their own bounds, added as squares.
    (p_low, p_high), (q_low, q_high) = share_interval(5, 10), share_interval(1, 10)
    found = share_difference((5, 1), 10)
    assert found.mean == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - math.sqrt((0.5 - p_low) ** 2 + (q_high - 0.1) ** 2))
    assert found.high == pytest.approx(0.4 + math.sqrt((p_high - 0.5) ** 2 + (0.1 - q_low) ** 2))
    assert share_difference((0, 0), 3).high > 0.5, "never in 3 is not never"


def test_slope() -> None:
    assert slope([0, 1, 2], [1, 3, 5]) == pytest.approx(2)
    assert slope([0, 1, 2], [0, 1, 0]) == pytest.approx(0)


def test_bootstrap_band_of_known_curves() -> None:
    curves = np.array([[0.0, 5.0, np.nan], [1.0, 5.0, np.nan], [2.0, 5.0, np.nan]])
    low, high = bootstrap_band(curves)
    # 1 of 27 resamples has the mean 0, more than 2.5 %: the band is the seeds' range.
    assert (low[0], high[0]) == (0.0, 2.0)
    assert (low[1], high[1]) == (5.0, 5.0)
    assert np.isnan(low[2]) and np.isnan(high[2])


# -- the clip under mismatch --


@pytest.mark.parametrize("kl", TABLE)
def test_the_closed_form_gives_the_simulated_table(kl: float) -> None:
    rates = clip_rates(kl, 4096, clip_low=3e-4, clip_high=4e-4)
    positive, negative = TABLE[kl]
    assert 100 * rates.positive == pytest.approx(positive, abs=1.1)
    assert 100 * rates.negative == pytest.approx(negative, abs=1.1)


def test_the_closed_form_is_the_share_of_sampled_responses() -> None:
    kl, length = 3e-4, 256
    d = np.random.default_rng(0).normal(-kl, math.sqrt(2 * kl), (20_000, length))
    found = clip_by_sign(d)
    rates = clip_rates(kl, length, clip_low=3e-4, clip_high=4e-4)
    assert found["positive"] == pytest.approx(rates.positive, abs=0.015)
    assert found["negative"] == pytest.approx(rates.negative, abs=0.015)
    assert found["kl"] == pytest.approx(kl, rel=0.01) and found["kl_k1"] == pytest.approx(kl, rel=0.1)


def test_without_variance_the_clip_is_a_step() -> None:
    rates = normal_clip_rates(-5e-4, 0.0, clip_low=3e-4, clip_high=4e-4)
    assert (rates.positive, rates.negative) == (0.0, 1.0)


# -- measurements --


def test_independent_tokens_have_slopes_of_a_half() -> None:
    values, curves = length_scaling(np.random.default_rng(1).normal(0, 0.1, (2000, 256)))
    assert values["slope_std_log_s"] == pytest.approx(-0.5, abs=0.04)
    assert values["slope_std_log_w"] == pytest.approx(0.5, abs=0.04)
    assert values["slope_std_token"] == pytest.approx(0, abs=0.01)
    assert curves["length"] == [8, 16, 32, 64, 128, 256]
    assert curves["std_log_s"][0] == pytest.approx(0.1 / math.sqrt(8), rel=0.05)


def test_a_shared_drift_does_not_average_out_unless_dealt_anew() -> None:
    generator = np.random.default_rng(2)
    d = generator.normal(0, 0.1, (500, 1)) + generator.normal(0, 0.01, (500, 256))
    values, _ = length_scaling(d)
    assert values["slope_std_log_s"] == pytest.approx(0, abs=0.02)
    assert values["slope_std_log_w"] == pytest.approx(1, abs=0.02)
    assert values["slope_std_log_s_independent"] == pytest.approx(-0.5, abs=0.05)


def test_what_has_not_moved_has_no_slope() -> None:
    values, _ = length_scaling(np.zeros((4, 32)))
    assert values["slope_std_log_s"] is None


def test_ratio_change_of_two_responses() -> None:
    d = np.log(np.array([[2.0, 0.5], [1.0, 1.0]]))
    change = ratio_change(d)
    assert change["token_rms"] == pytest.approx(math.log(2) / math.sqrt(2))
    assert change["sequence_rms"] == 0.0
    assert change["token_ratio_max"] == pytest.approx(2.0)
    assert change["token_outside"] == 0.5 and change["sequence_outside"] == 0.0


# -- one number of a training run --


def test_reductions() -> None:
    run = result(
        reward_mean=[0.0, 0.2, None, 0.4, 0.6, 0.8],
        time_step_s=[1.0] * 6,
        clip_fraction_token_mini_batches=[[0.0, 0.5], None, [0.2, None]],
    )
    assert number(run, "reward_mean", "mean") == pytest.approx(0.4)
    assert number(run, "reward_mean", "first:2") == pytest.approx(0.1)
    assert number(run, "reward_mean", "last:2") == pytest.approx(0.7)
    assert number(run, "reward_mean", "final") == 0.8
    assert number(run, "clip_fraction_token_mini_batches[0]", "max") == 0.2
    assert number(run, "clip_fraction_token_mini_batches[1]", "mean") == 0.5
    assert math.isnan(number(run, "entropy", "mean")), "what was not measured is no number"


def test_batches_and_seconds_to_a_reward() -> None:
    run = result(reward_mean=[0.0] * 5 + [1.0] * 5, time_step_s=[2.0] * 10)
    # The mean of 5 batches reaches 0.6 when 3 of them are 1: after batch 8.
    assert number(run, "reward_mean", "batches_to:0.6") == 8
    assert number(run, "reward_mean", "seconds_to:0.6") == 16
    assert math.isnan(number(run, "reward_mean", "batches_to:1.5"))


def collapsed_from(rewards: list[float]) -> float | None:
    collapse = Collapse(5)
    for reward in rewards:
        collapse.add(reward)
    return collapse.collapsed_from


def test_collapse_is_half_of_the_best() -> None:
    assert collapsed_from([0.8] * 10 + [0.3] * 5) == pytest.approx(0.8)
    assert collapsed_from([0.8] * 10 + [0.3] * 4 + [0.41]) is None, "each of the last, not their mean"
    assert collapsed_from([0.1] * 10 + [0.9] * 5) is None
    assert collapsed_from([0.8] * 4 + [0.1] * 5) is None, "too short to have a best"
    assert collapsed_from([0.0] * 20) is None, "nothing was there to lose"
    assert collapsed_from([0.8] * 10 + [0.3] * 5 + [0.9]) is None
    assert has_collapsed([0.8] * 10 + [0.3] * 5 + [0.9] * 10, 5), "a collapse that the run came back from is one"
    assert not has_collapsed([0.8] * 10 + [0.3] * 4 + [0.9] * 10, 5)
    assert number(result(reward_mean=[0.8] * 10 + [0.3, None] + [0.3] * 4), "reward_mean", "collapsed") == 1
