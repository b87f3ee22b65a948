"""Names what is wrong with a run, from its rows of metrics alone, with figures and a remedy.

The watchdog looks at each row in the light of those before it, and at nothing else: a run in progress, one that was
resumed and a report of one that has ended come to the same findings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_megatron.metrics import NON_FINITE
from gspo_megatron.stability.gate import largest_kl
from gspo_megatron.stability.history import History, Row, value_of

# Thresholds were set on runs of tests/system/watchdog_worker.py with seeds 0 and 1; its test has other seeds.

# KL of engine and trainer per token that two programs with the same weights stay under, by the policy's dtype.
# float32: 1e-12 is measured. bfloat16: up to 1.5e-3 is reported of Mixture-of-Experts models without route replay.
MISMATCH_KL = {"float32": 1e-5, "bfloat16": 5e-3}
# Largest |log s| of mini-batch 1 with log-probabilities in float32: 1e-6 is measured, 1e-3 is what bfloat16 gives.
SAME_POLICY = 1e-5
# Another temperature turns the slope of the engine's log-probs by the trainer's and leaves little scatter; other
# weights scatter more than they turn. |slope - 1| over √(1 - correlation²): 3.5 was measured, and 0.1 to 0.6.
TEMPERATURE_TURN = 2.0
# Nats a token: the policy has left the one that sampled. 0.02 in a fast healthy run, 2.8 at 100 times its lr.
LARGE_STALENESS = 0.2
IDLE_CLIP = 2.5  # clip over the deviation of log s: 0.6 to 1.3 in healthy runs, 3.6 at a clip of 0.2
IDLE_SHARE = 0.02  # of the responses clipped: 0.05 to 0.25, and 0.007 to 0.015
CLIPS = 0.06  # of the responses clipped in `patience` batches: 0.13 to 0.18 early in healthy runs, 0.02 and 0.03
ONE_SIDED = 4.0  # clip fractions of negative and positive advantages
MIN_HISTORY = 5  # rows before a median or a best is one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    name: str  # one of CHECKS
    step: int  # the rollout batch
    message: str  # what, with figures; and what to do


@dataclass(frozen=True)
class Facts:
    """What the watchdog knows of a run besides its rows."""

    clip_low: float | None  # None: the algorithm has no clip
    clip_high: float | None
    mini_batches: int
    is_sequence_level: bool = True
    dtype: str = "float32"
    recomputes: bool = True  # old log-probs are the trainer's
    patience: int = 5  # rollout batches in a row
    entropy_floor: float = 1e-3  # nats
    spike: float = 10.0  # of a gradient norm, over the median

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Facts:
        """From a resolved config as nested plain values."""
        algorithm, model, watchdog = (config.get(k, {}) for k in ("algorithm", "model", "watchdog"))
        return cls(
            clip_low=algorithm.get("clip_low"),
            clip_high=algorithm.get("clip_high"),
            mini_batches=algorithm.get("mini_batches") or 4,
            is_sequence_level=algorithm.get("name", "gspo") in ("gspo", "gspo_token", "luspo"),
            dtype=model.get("dtype", "float32"),
            recomputes=algorithm.get("old_logprobs", "recompute") == "recompute",
            patience=watchdog.get("patience", cls.patience),
            entropy_floor=watchdog.get("entropy_floor", cls.entropy_floor),
            spike=watchdog.get("spike", cls.spike),
        )


class Watchdog:
    """Reads a run's rows one after the other."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.history = facts, History(facts.patience)
        self.findings: list[Finding] = []  # what is wrong at the last row

    def see(self, row: Row) -> list[Finding]:
        """Take up the next object of metrics.jsonl; what is wrong there and was not at the row before."""
        self.history.add(row)
        if not self.history.rows:
            return []
        before = {finding.name for finding in self.findings}
        found = {name: check(self.history, self.facts) for name, check in CHECKS.items()}
        step = self.history.rows[-1]["step"]
        self.findings = [Finding(name, step, message) for name, message in found.items() if message is not None]
        return [finding for finding in self.findings if finding.name not in before]

    def spike_limit(self) -> float:
        """The gradient norm above which the next batch has a spike: a multiple of the median of `grad_norm` over the
        rows that have a gradient; infinite while these are too few."""
        return _spike_limit(self.history.norms, self.facts)


def review(rows: Iterable[Row], facts: Facts) -> list[Finding]:
    """All findings of a whole run, each where it begins: not again in the batch after one that had it."""
    watchdog = Watchdog(facts)
    return [finding for row in rows for finding in watchdog.see(row)]


def _spike_limit(norms: tuple[int, float], facts: Facts) -> float:
    count, median = norms
    return facts.spike * median if count >= MIN_HISTORY else math.inf


def _non_finite(history: History, facts: Facts) -> str | None:
    row = history.rows[-1]
    infinite_by_nature = ("expert_gradient_spread",)
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    bad = [key for key in [*bad, *row.get(NON_FINITE, {})] if not key.startswith(infinite_by_nature)]
    if not bad:
        return None
    shown = f"{', '.join(bad)} not finite: "
    if skipped := value_of(row, "skipped_steps"):
        shown += f"optimizer steps left out: {skipped:.0f} of {facts.mini_batches}"
        return f"{shown}, so that the weights are sound; if it recurs, lower the lr"
    return f"{shown}the weights may be lost; go on from the last checkpoint, at a lower lr"


def _gradient_spike(history: History, facts: Facts) -> str | None:
    largest, limit = value_of(history.rows[-1], "grad_norm_max"), _spike_limit(history.norms_before, facts)
    if largest is None or largest <= limit:
        return None
    _, median = history.norms_before
    remedy = "a lower lr or clip_grad keeps the step small"
    if value_of(history.rows[-1], "skipped_steps"):
        remedy = "its optimizer step was left out"
    return (
        f"a gradient norm of {largest:.3g} is {largest / median:.0f} times the median of {median:.3g}; {remedy}; look "
        "at token_ratio_max and the samples"
    )


def _reward_collapse(history: History, facts: Facts) -> str | None:
    n = facts.patience
    last = history.last("reward_mean", n)
    best = history.reward.collapsed_from
    if last is None or best is None:
        return None
    return (
        f"the reward has been under half of its best for {n} batches: {statistics.fmean(last):.3g} of {best:.3g}; "
        "go on from an earlier checkpoint at a lower lr"
    )


def _entropy_floor(history: History, facts: Facts) -> str | None:
    entropy = value_of(history.rows[-1], "entropy")
    if entropy is None or entropy >= facts.entropy_floor:
        return None
    return (
        f"an entropy of {entropy:.2g} nats is under watchdog.entropy_floor={facts.entropy_floor:g}: nothing is "
        "explored any more; an entropy_coefficient, a higher temperature, or harder prompts"
    )


def _constant_reward(history: History, facts: Facts) -> str | None:
    shares = history.last("zero_variance_group_fraction", min(3, facts.patience))
    if shares is None or min(shares) < 1:
        return None
    reward = value_of(history.rows[-1], "reward_mean")
    shown = "none" if reward is None else f"{reward:.3g}"
    return (
        f"in {len(shares)} batches all rewards of a group were equal (mean {shown}): nothing is learned; check the "
        "reward, or choose prompts that are neither always nor never solved"
    )


def _mismatch(history: History, facts: Facts) -> tuple[str, float] | None:
    """(cause, KL): "temperature", "stale" or "weights"; None while engine and trainer agree."""
    row, limit = history.rows[-1], MISMATCH_KL.get(facts.dtype, MISMATCH_KL["float32"])
    kl = value_of(row, "kl_rollout_trainer")
    if kl is None or kl <= limit:
        return None
    correlation, slope = value_of(row, "rollout_trainer_correlation"), value_of(row, "rollout_trainer_slope")
    assert history.first_mismatch is not None
    if history.first_mismatch <= limit:
        return "stale", kl  # it agreed before weights were updated
    if correlation is None or slope is None:
        return "weights", kl
    scatter = math.sqrt(max(0.0, 1 - correlation**2))
    return ("temperature" if abs(slope - 1) > TEMPERATURE_TURN * scatter else "weights"), kl


def _stale_engine(history: History, facts: Facts) -> str | None:
    found = _mismatch(history, facts)
    if found is None or found[0] != "stale":
        return None
    return (
        f"engine and trainer agreed at first and are now {found[1]:.2g} nats a token (KL) apart: the engine does not "
        "get the last weight update; see the weight sync"
    )


def _temperature(history: History, facts: Facts) -> str | None:
    found = _mismatch(history, facts)
    if found is None or found[0] != "temperature":
        return None
    slope = history.rows[-1]["rollout_trainer_slope"]
    return (
        f"the engine's log-probs follow the trainer's with a slope of {slope:.2f} (KL {found[1]:.2g} a token): they "
        f"are of another temperature, about {1 / max(slope, 1e-6):.2f} times; set the same on both sides"
    )


def _other_weights(history: History, facts: Facts) -> str | None:
    found = _mismatch(history, facts)
    if found is None or found[0] != "weights":
        return None
    correlation = value_of(history.rows[-1], "rollout_trainer_correlation")
    shown = "unknown" if correlation is None else f"{correlation:.3f}"
    return (
        f"engine and trainer are {found[1]:.2g} nats a token (KL) apart from the start, correlation {shown}: some of "
        "the engine's weights are not the trainer's, e.g. an expert in another's place; check the conversion"
    )


def _old_policy(history: History, facts: Facts) -> str | None:
    gap = value_of(history.rows[-1], "old_logprob_gap_first_mini_batch")
    is_bypassed = value_of(history.rows[-1], "time_logprobs_saved_s") is not None
    if gap is None or gap <= SAME_POLICY or is_bypassed:
        return None
    clip = "" if facts.clip_low is None else f". The clip is {facts.clip_low:g} / {facts.clip_high:g}"
    return (
        f"|log s| is up to {gap:.2g} in mini-batch 1, where no weight has changed: old log-probs have lost precision "
        f"(bfloat16 gives 1e-4 to 1e-2) or are of another policy; keep them in float32{clip}"
    )


def _clip_never(history: History, facts: Facts) -> str | None:
    n = facts.patience
    clipped, spread = history.last("clip_fraction_sequence", n), history.last("log_ratio_sequence_std", n)
    rates = [x for row in history.rows[-n:] if (x := value_of(row, "learning_rate")) is not None]
    if facts.mini_batches < 2 or not facts.is_sequence_level or clipped is None or spread is None:
        return None
    if facts.clip_low is None or facts.clip_high is None:
        return None
    narrow = min(-math.log1p(-facts.clip_low), math.log1p(facts.clip_high))
    if (
        rates and min(rates) < (history.largest_rate or 0.0) / 2
    ):  # at the end of a decay, or in the warm-up, little moves
        return None
    if history.most_clipped > CLIPS:  # it did clip while the policy moved: what has converged needs no clip
        return None
    deviation = statistics.median(spread)
    if statistics.fmean(clipped) > IDLE_SHARE or narrow < IDLE_CLIP * deviation:
        return None
    return (
        f"{statistics.fmean(clipped):.1%} of the responses were clipped in {n} batches: log s has a deviation of "
        f"{deviation:.2g}, the clip begins at {narrow:.2g}. That is a clip for token ratios; GSPO's is 3e-4 / 4e-4, "
        "wider for short responses"
    )


def _large_updates(history: History, facts: Facts) -> str | None:
    staleness = value_of(history.rows[-1], "kl_staleness")
    if staleness is None or staleness <= LARGE_STALENESS:
        return None
    clipped = value_of(history.rows[-1], "clip_fraction_sequence")
    shown = "" if clipped is None else f", {clipped:.0%} of the responses are clipped"
    return (
        f"a batch's updates move the policy by {staleness:.2g} nats a token (KL){shown}: the steps are too large; "
        "lower the lr, or fewer mini-batches"
    )


def _one_sided_clip(history: History, facts: Facts) -> str | None:
    row, n = history.rows[-1], min(3, facts.patience)
    below, above = history.last("clip_fraction_negative", n), history.last("clip_fraction_positive", n)
    if below is None or above is None or min(below) < 0.5 or min(below) < ONE_SIDED * max(above):
        return None
    negative, positive = below[-1], above[-1]
    kl, length = value_of(row, "kl_rollout_trainer"), value_of(row, "response_length_mean") or 1.0
    why = "log s is off centre"
    clip = facts.clip_low
    if (
        clip is not None
        and kl is not None
        and kl > (bears := largest_kl(clip, length if facts.is_sequence_level else 1.0))
    ):
        why = f"train/rollout KL {kl:.2g} exceeds the {bears:.2g} that a clip of {clip:g} bears"
    return (
        f"{negative:.0%} of negative-advantage sequences are clipped while {positive:.0%} of positive ones are: {why}; "
        f"{'' if facts.recomputes else 'recompute old log-probs, or '}widen the clip, or lower the lr"
    )


CHECKS: dict[str, Callable[[History, Facts], str | None]] = {
    "non_finite": _non_finite,
    "gradient_spike": _gradient_spike,
    "reward_collapse": _reward_collapse,
    "entropy_floor": _entropy_floor,
    "constant_reward": _constant_reward,
    "stale_engine": _stale_engine,
    "temperature": _temperature,
    "other_weights": _other_weights,
    "old_policy": _old_policy,
    "clip_never": _clip_never,
    "large_updates": _large_updates,
    "one_sided_clip": _one_sided_clip,
}
