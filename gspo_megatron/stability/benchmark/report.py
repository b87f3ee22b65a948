"""The report's four files: report.html, report.png, report.md, report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.stability.benchmark import page
from gspo_megatron.stability.benchmark.cells import Plan
from gspo_megatron.stability.benchmark.figure import draw
from gspo_megatron.stability.benchmark.results import Result, write_atomically
from gspo_megatron.stability.benchmark.spec import Spec
from gspo_megatron.stability.benchmark.verdicts import Verdict, judge


def write_report(
    spec: Spec,
    plan: Plan,
    results: Mapping[str, Result],
    failures: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, str],
    out: Path,
) -> tuple[list[Path], list[Verdict]]:
    """Judge the claims and write everything into `out`; what has no result yet is named as missing.

    Args:
        facts: the environment, in words.
    """
    verdicts = judge(spec, plan, results, failures)
    missing = missing_lines(plan, results, failures)
    facts = {**facts, **cost(plan, results)}
    light, dark = draw(spec, plan, results), draw(spec, plan, results, dark=True)
    paths = [out / f"report.{kind}" for kind in ("html", "png", "md", "json")]
    out.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(
        page.html(spec, plan, verdicts, facts, missing, light_png=light, dark_png=dark), encoding="utf-8"
    )
    paths[1].write_bytes(light)
    paths[2].write_text(page.markdown(spec, verdicts, facts, missing), encoding="utf-8")
    write_atomically(paths[3], as_data(spec, plan, verdicts, results, facts, missing))
    return paths, verdicts


def missing_lines(plan: Plan, results: Mapping[str, Result], failures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every cell without a result, failed ones first and with what they said."""
    lines = []
    for cell in plan.cells.values():
        if cell.id in failures and cell.id not in results:
            failure = failures[cell.id]
            last = next((line for line in reversed(failure["log"]) if line.strip()), "")
            lines.append(f"failed ({failure['reason']}): {cell.title}; cells/{cell.id}/log.txt ends: {last}")
    rest = [c for c in plan.cells.values() if c.id not in results and c.id not in failures]
    for cell in rest:
        why = f", which waits for {cell.parent}" if cell.parent and cell.parent not in results else ""
        lines.append(f"not run: {cell.title} ({cell.id}{why})")
    return lines


def cost(plan: Plan, results: Mapping[str, Result]) -> dict[str, str]:
    """What the results took."""
    seconds = sum(r.seconds for r in results.values())
    return {"cells": f"{len(results)} of {len(plan.cells)} done, {seconds / 60:.0f} minutes of one process in all"}


def as_data(
    spec: Spec,
    plan: Plan,
    verdicts: Sequence[Verdict],
    results: Mapping[str, Result],
    facts: Mapping[str, str],
    missing: Sequence[str],
) -> dict[str, Any]:
    """report.json: verdicts with their values; each cell's settings, time and measured values."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    claims = []
    for v in verdicts:
        estimate = v.estimate
        claims.append(
            {
                "experiment": v.experiment,
                "name": v.claim.name,
                "claim": v.claim.text,
                "paper": v.claim.paper,
                "rule": v.claim.rule,
                "metric": v.claim.metric,
                "by_seed": {str(seed): value for seed, value in v.by_seed.items()},
                "of_and_against": {str(seed): list(pair) for seed, pair in v.sides.items()},
                "mean": None if estimate is None else plain(estimate.mean),
                "interval": None if estimate is None else [plain(estimate.low), plain(estimate.high)],
                "p": v.p,
                "verdict": v.verdict,
                "conditions": page.conditions(spec, v),
            }
        )
    cells = {
        cell.id: {
            "title": cell.title,
            "command": cell.command,
            "base": cell.base,
            "settings": cell.settings,
            "seconds": results[cell.id].seconds if cell.id in results else None,
            "values": dict(results[cell.id].values) if cell.id in results else {},
        }
        for cell in plan.cells.values()
    }
    return {"name": spec.name, "claims": claims, "missing": list(missing), "environment": dict(facts), "cells": cells}
