from __future__ import annotations

import math

import numpy as np
import pytest

from gspo_megatron.stability.quantities import (
    clip_band,
    first_last_gain,
    first_last_means,
    last_list_means,
    moving_mean,
    smoothing_window,
)
from gspo_megatron.stability.report import first_last_gain as exported


def rows(*rewards: float | None) -> list[dict[str, float | None]]:
    return [{"step": i, "reward_mean": reward} for i, reward in enumerate(rewards)]


def test_gain_is_the_difference_of_means() -> None:
    assert first_last_gain(rows(0, 1, 2, 50, 7, 8, 12), n=3) == pytest.approx(9 - 1)
    assert first_last_means(rows(0, 1, 2, 50, 7, 8, 12), "reward_mean", 3) == (1, 9)
    assert exported is first_last_gain


def test_gain_leaves_out_rows_without_a_reward() -> None:
    assert first_last_gain([{"step": 0}, *rows(None, 1, None, 2, 5, None, 8, None)], n=2) == pytest.approx(5)


def test_gain_is_none_when_the_ends_would_share_batches() -> None:
    assert first_last_gain(rows(*range(9))) is None
    assert first_last_gain(rows(*range(10))) == 5
    assert first_last_gain([]) is None


@pytest.mark.parametrize("window", [1, 3, 7, 25])
def test_moving_mean_equals_its_definition(window: int) -> None:
    values = np.random.default_rng(0).normal(size=12)
    values[[3, 4, 9]] = math.nan
    half = window // 2
    for i, got in enumerate(moving_mean(values, window)):
        inside = values[max(0, i - half) : i + half + 1]
        inside = inside[np.isfinite(inside)]
        assert got == pytest.approx(math.nan if np.isnan(values[i]) else inside.mean(), nan_ok=True)


def test_windows_are_odd_and_bounded() -> None:
    windows = [smoothing_window(n) for n in range(1, 1000)]
    assert all(w % 2 for w in windows)
    assert windows[0] == 1 and max(windows) == 25 and windows == sorted(windows)


def test_clip_band_is_in_log_ratio() -> None:
    band = clip_band({"algorithm": {"clip_low": 0.2, "clip_high": 0.27}})
    assert band == pytest.approx((math.log(0.8), math.log(1.27)))
    assert clip_band({"algorithm": {"clip_low": 0.2}}) is None
    assert clip_band({}) is None
    assert clip_band(None) is None


def test_means_of_a_metric_of_several_numbers() -> None:
    rows = [{"x": [9.0]}, {"x": None}, {}, {"x": [1.0, None, None]}, {"x": [3.0, 4.0, None]}]
    assert last_list_means(rows, "x") == [2.0, 4.0, None]
    assert last_list_means(rows, "x", 1) == [3.0, 4.0, None]
    assert last_list_means(rows, "y") is None
