"""From results to verdicts, by the rules that were written before the runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gspo_megatron.stability.benchmark.cells import Plan
from gspo_megatron.stability.benchmark.results import Result, number
from gspo_megatron.stability.benchmark.spec import Claim, Settings, Spec
from gspo_megatron.stability.benchmark.statistics import (
    Estimate,
    mean_interval,
    share_difference,
    sign_flip_p,
    slope,
)

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What the results say of a claim."""

    experiment: str
    claim: Claim
    by_seed: Mapping[int, float]  # the claim's value
    planned_seeds: int
    estimate: Estimate | None  # in the claim's own unit; of a ratio the geometric mean
    p: float | None  # ratio, difference: exact paired sign-flip test against no difference
    verdict: str
    notes: tuple[str, ...] = field(default=())
    sides: Mapping[int, tuple[float, float]] = field(
        default_factory=dict
    )  # by seed, what a ratio or difference compares


def judge(spec: Spec, plan: Plan, results: Mapping[str, Result], failures: Collection[str] = ()) -> list[Verdict]:
    """The verdict of every claim; `results` holds the cells that are done, `failures` the ids of those that failed."""
    return [
        _judge_claim(experiment.name, claim, plan, results, failures, experiment.seeds)
        for experiment in spec.experiments
        for claim in experiment.claims
    ]


def decide(estimate: Estimate, low: float, high: float) -> str:
    """Supported: the interval lies in [low, high]. Contradicted: it lies outside. Else undecided."""
    if low <= estimate.low and estimate.high <= high:
        return SUPPORTED
    if estimate.high < low or estimate.low > high:
        return CONTRADICTED
    return UNDECIDED


def _judge_claim(
    experiment: str,
    claim: Claim,
    plan: Plan,
    results: Mapping[str, Result],
    failures: Collection[str],
    seeds: tuple[int, ...],
) -> Verdict:
    notes: list[str] = []
    by_seed: dict[int, float] = {}
    sides: dict[int, tuple[float, float]] = {}
    for seed in seeds:
        value = _value(experiment, claim, plan, results, seed, notes, sides)
        if value is not None:
            by_seed[seed] = value
    if not by_seed:
        return Verdict(experiment, claim, {}, len(seeds), None, None, UNDECIDED, _short(notes))
    is_log = claim.kind == "ratio"
    inner = [math.log(v) if is_log else v for v in by_seed.values()]
    estimate = mean_interval(inner)
    p = sign_flip_p(inner) if claim.kind in ("ratio", "difference") else None
    if is_log:
        estimate = Estimate(_exp(estimate.mean), _exp(estimate.low), _exp(estimate.high), estimate.num_seeds)
    if claim.kind == "difference" and claim.reduce == "collapsed":
        # Student's interval of equal values has width 0, as if 0 of 3 meant never.
        counts = (round(sum(a for a, _ in sides.values())), round(sum(b for _, b in sides.values())))
        estimate = share_difference(counts, len(sides))
        notes.append(f"{counts[0]} against {counts[1]} of {len(sides)}, Newcombe's interval of two shares")
    elif len(by_seed) > 1 and estimate.low == estimate.high:
        notes.append("all seeds equal: an interval without width, not certainty")
    if len(by_seed) == 1:
        notes.append("one seed has no interval")
    verdict = decide(estimate, claim.low, claim.high)
    lost = [
        seed for seed in seeds if seed not in by_seed and _is_lost(experiment, claim, plan, results, failures, seed)
    ]
    if lost:
        # A run that diverged, or never reached what is timed, is no run left out by chance.
        verdict = UNDECIDED
        notes.insert(0, f"no verdict without seed {', '.join(map(str, lost))}, which ran and gave no value")
    return Verdict(experiment, claim, by_seed, len(seeds), estimate, p, verdict, _short(notes), sides)


def _is_lost(
    experiment: str,
    claim: Claim,
    plan: Plan,
    results: Mapping[str, Result],
    failures: Collection[str],
    seed: int,
) -> bool:
    """Whether a seed without a value has run: a cell of it failed, or all have results, from which none comes."""
    sides = [claim.of, claim.against] if claim.against else [claim.of]
    ids = {p.cell.id for side in sides for p in plan.find(experiment, {**side, "seed": seed})}
    return any(i in failures and i not in results for i in ids) or all(i in results for i in ids)


def _short(notes: list[str], most: int = 2) -> tuple[str, ...]:
    """The first notes; of more, how many there are."""
    different = list(dict.fromkeys(notes))
    rest = len(different) - most
    return (*different[:most], f"and {rest} more such notes") if rest > 0 else tuple(different)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _value(
    experiment: str,
    claim: Claim,
    plan: Plan,
    results: Mapping[str, Result],
    seed: int,
    notes: list[str],
    sides: dict[int, tuple[float, float]],
) -> float | None:
    """The claim's value for one seed; None where something is missing, with a note. `sides` gets the two that a ratio
    or difference compares."""

    def numbers(selector: Settings) -> dict[float | None, float] | None:
        found: dict[float | None, float] = {}
        for placed in plan.find(experiment, {**selector, "seed": seed}):
            result = results.get(placed.cell.id)
            value = math.nan if result is None else number(result, claim.metric, claim.reduce)
            if not math.isfinite(value):
                what = "has no result" if result is None else f"has no {claim.metric} ({claim.reduce or 'value'})"
                notes.append(f"{placed.cell.title} {what}")
                return None
            if claim.kind in ("ratio", "slope") and value < claim.floor:
                notes.append(f"{placed.cell.title}: {claim.metric} {value:.3g} counted as {claim.floor:g}")
                value = claim.floor
            found[placed.labels.get(claim.over) if claim.over else None] = value
        return found or None

    of = numbers(claim.of)
    against = numbers(claim.against) if claim.against else {}
    if of is None or against is None:
        return None
    if claim.kind == "slope":
        if len(of) < 2 or min(of.values()) <= 0:
            notes.append(f"seed {seed}: a slope needs two positive values")
            return None
        return slope([math.log(float(x)) for x in of if x is not None], [math.log(y) for y in of.values()])
    if claim.kind == "value":
        return of[None]
    sides[seed] = of[None], against[None]
    if claim.kind == "difference":
        return of[None] - against[None]
    if of[None] == against[None] == claim.floor:
        notes.insert(0, f"seed {seed}: both sides are at the floor of {claim.floor:g}, and their ratio says nothing")
        return None
    if of[None] <= 0 or against[None] <= 0:
        notes.append(f"seed {seed}: a ratio needs positive values, not {of[None]:.3g} and {against[None]:.3g}")
        return None
    return of[None] / against[None]
