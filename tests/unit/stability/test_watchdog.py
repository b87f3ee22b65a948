"""Each check against rows made by hand; what real faults look like is tested in tests/system/test_watchdog.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.stability.watchdog import CHECKS, Facts, Finding, Watchdog, review

FACTS = Facts(clip_low=0.03, clip_high=0.04, mini_batches=4)
HEALTHY: dict[str, Any] = {
    "reward_mean": 0.5,
    "entropy": 0.3,
    "loss": 0.0,
    "grad_norm": 3.0,
    "grad_norm_max": 4.0,
    "learning_rate": 1e-4,
    "clip_fraction_sequence": 0.15,
    "clip_fraction_positive": 0.1,
    "clip_fraction_negative": 0.2,
    "log_ratio_sequence_std": 0.03,
    "response_length_mean": 8.0,
    "kl_rollout_trainer": 2e-13,
    "rollout_trainer_correlation": 1.0,
    "rollout_trainer_slope": 1.0,
    "kl_staleness": 0.01,
    "old_logprob_gap_first_mini_batch": 0.0,
    "zero_variance_group_fraction": 0.3,
}


def rows(count: int, *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluation before training, `count` healthy rows, then one for each of the changes."""
    trained = [HEALTHY | change for change in [{}] * count + list(changes)]
    return [{"step": 0, "eval_reward_mean": 0.1}] + [{"step": i} | row for i, row in enumerate(trained, start=1)]


def after(history: list[dict[str, Any]], facts: Facts) -> Watchdog:
    watchdog = Watchdog(facts)
    for row in history:
        watchdog.see(row)
    return watchdog


def examine(history: list[dict[str, Any]], facts: Facts) -> list[Finding]:
    return after(history, facts).findings


def names(history: list[dict[str, Any]], facts: Facts = FACTS) -> list[str]:
    return [finding.name for finding in examine(history, facts)]


def test_quiet_on_a_healthy_run_and_on_what_was_not_measured() -> None:
    assert review(rows(12), FACTS) == []
    assert examine([], FACTS) == examine([{"step": 0}], FACTS) == []
    assert review([{"step": i, **dict.fromkeys(HEALTHY)} for i in range(12)], FACTS) == []


MISMATCH = {"kl_rollout_trainer": 2e-3, "rollout_trainer_correlation": 0.995, "rollout_trainer_slope": 0.976}
CASES: dict[str, list[dict[str, Any]]] = {
    "non_finite": rows(1, {"loss": math.nan}),
    "gradient_spike": rows(5, {"grad_norm_max": 31.0}),
    "reward_collapse": rows(6, *[{"reward_mean": 0.2}] * 5),
    "entropy_floor": rows(1, {"entropy": 5e-4}),
    "constant_reward": rows(1, *[{"zero_variance_group_fraction": 1.0}] * 3),
    "stale_engine": rows(1, MISMATCH),
    "temperature": rows(0, MISMATCH | {"rollout_trainer_correlation": 0.998, "rollout_trainer_slope": 0.78}),
    "other_weights": rows(0, MISMATCH),
    "old_policy": rows(1, {"old_logprob_gap_first_mini_batch": 2e-3}),
    "clip_never": rows(0, *[{"clip_fraction_sequence": 0.0, "log_ratio_sequence_std": 0.005}] * 5),
    "large_updates": rows(1, {"kl_staleness": 0.5}),
    "one_sided_clip": rows(1, *[{"clip_fraction_negative": 0.92, "clip_fraction_positive": 0.01}] * 3),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_fault_is_named_alone(name: str) -> None:
    assert names(CASES[name]) == [name]


NEARLY: dict[str, list[dict[str, Any]]] = {
    "a norm below the spike": rows(5, {"grad_norm_max": 29.0}),
    "a spike without history": rows(4, {"grad_norm_max": 31.0}),
    "a reward above half of its best": rows(6, *[{"reward_mean": 0.2}] * 4, {"reward_mean": 0.26}),
    "two constant batches": rows(1, *[{"zero_variance_group_fraction": 1.0}] * 2),
    "rounding of the engine": rows(1, MISMATCH | {"kl_rollout_trainer": 5e-6}),
    "an idle clip at the end of the decay": rows(
        1, *[{"clip_fraction_sequence": 0.0, "log_ratio_sequence_std": 0.005, "learning_rate": 4e-5}] * 5
    ),
    "one-sided in one batch": rows(1, {"clip_fraction_negative": 0.92, "clip_fraction_positive": 0.01}),
    "the spread of expert gradients": rows(1, {"expert_gradient_spread": math.inf}),
}


@pytest.mark.parametrize("case", NEARLY)
def test_quiet_short_of_a_fault(case: str) -> None:
    assert names(NEARLY[case]) == []


def test_figures_and_remedies_are_told() -> None:
    facts = Facts(clip_low=3e-4, clip_high=4e-4, mini_batches=4, recomputes=False, dtype="bfloat16")
    change = {"clip_fraction_negative": 0.92, "clip_fraction_positive": 0.01, "kl_rollout_trainer": 1.5e-3}
    [finding] = examine(rows(0, *[change | {"response_length_mean": 4096.0}] * 3), facts)
    assert finding.message == (
        "92% of negative-advantage sequences are clipped while 1% of positive ones are: train/rollout KL 0.0015 exceeds"
        " the 4.8e-05 that a clip of 0.0003 bears; recompute old log-probs, or widen the clip, or lower the lr"
    )
    [finding] = examine(CASES["gradient_spike"], FACTS)
    assert "gradient norm of 31 is 10 times the median of 3" in finding.message


def test_steps_that_were_left_out_are_told() -> None:
    [finding] = examine(rows(5, {"grad_norm_max": 31.0, "skipped_steps": 1}), FACTS)
    assert "31 is 10 times the median of 3; its optimizer step was left out" in finding.message
    [finding] = examine(rows(1, {"grad_norm_max": math.nan, "loss": math.nan, "skipped_steps": 2}), FACTS)
    assert finding.message.startswith("loss, grad_norm_max not finite: optimizer steps left out: 2 of 4")


def test_the_limit_of_a_gradient_norm_is_a_multiple_of_the_median() -> None:
    norms = [5.0, 1.0, 3.0, 2.0, 4.0]
    history = rows(0, *[{"grad_norm": norm} for norm in norms])
    assert after(history, replace(FACTS, spike=4.0)).spike_limit() == 12.0
    assert after(history[:-1], FACTS).spike_limit() == math.inf
    assert after([*history, {"step": 6, "grad_norm": None}], FACTS).spike_limit() == 30.0


def test_non_finite_values_are_seen_in_a_run_and_in_its_records() -> None:
    live = rows(1, {"grad_norm": math.inf})
    read = rows(1, {"grad_norm": None, "non_finite": {"grad_norm": "inf", "expert_gradient_spread_layers/2": "inf"}})
    for history in (live, read):
        assert [f.message.split(":")[0] for f in examine(history, FACTS)] == ["grad_norm not finite"]


def test_a_review_tells_when_a_fault_begins() -> None:
    history = rows(2, MISMATCH, MISMATCH, {}, MISMATCH)
    assert [(f.name, f.step) for f in review(history, FACTS)] == [("stale_engine", 3), ("stale_engine", 6)]


def test_an_engine_that_stands_in_for_the_old_policy_is_not_mismatched_with_itself() -> None:
    assert names(rows(1, {"old_logprob_gap_first_mini_batch": 2e-3, "time_logprobs_saved_s": 0.1})) == []


def test_facts_of_a_config() -> None:
    config = {
        "algorithm": {"name": "grpo", "clip_low": 0.2, "clip_high": 0.27, "mini_batches": 2, "old_logprobs": "auto"},
        "model": {"dtype": "bfloat16"},
        "watchdog": {"patience": 7, "entropy_floor": 0.01, "spike": 5.0},
    }
    assert Facts.of(config) == Facts(0.2, 0.27, 2, False, "bfloat16", False, 7, 0.01, 5.0)
    assert Facts.of({}) == Facts(None, None, 4)


def test_a_clip_that_was_at_work_may_rest_when_the_policy_has_converged() -> None:
    idle = {"clip_fraction_sequence": 0.0, "log_ratio_sequence_std": 0.005}
    assert names(rows(5, *[idle] * 10)) == []
    assert names(rows(0, *[idle] * 10)) == ["clip_never"]


def test_an_algorithm_without_a_clip_is_told_nothing_of_clips() -> None:
    facts = Facts.of({"algorithm": {"name": "sapo", "mini_batches": 4}})
    idle = {"clip_fraction_sequence": 0.0, "clip_fraction_positive": 0.0, "clip_fraction_negative": 0.0}
    assert names(rows(0, *[idle | {"log_ratio_sequence_std": 1e-5}] * 8), facts) == []
    [finding] = examine(CASES["old_policy"], facts)
    assert "clip" not in finding.message
