"""A picture of a report: times and memory of every candidate, a row a case."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from kernel_benchmark.report import MIB, CaseResult, Report
from kernel_benchmark.worker import OK

OURS, PEERS = "#1b6ca8", "#9a9a9a"
INCHES_A_BAR = 0.28


def draw(report: Report, path: Path) -> None:
    cases = [case for case in report.cases if any(row.status == OK for row in case.rows)]
    if not cases:
        return
    heights = [2 + len(_rows(case)) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(15, INCHES_A_BAR * sum(heights) + len(cases)),
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2]},
        squeeze=False,
        layout="constrained",
    )
    for case, (times, memory) in zip(cases, axes, strict=True):
        _draw_times(times, case)
        _draw_memory(memory, case)
    where = report.machine.get("gpu", f"{report.machine['cpu']}, {report.machine['threads']} thread(s)")
    figure.suptitle(f"{where}, torch {report.machine['torch']}, {report.date}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rows(case: CaseResult) -> list[tuple[str, str, float, float, float, float | None]]:
    """label, colour, forward ms, together ms, floor ms, extra MiB; top to bottom."""
    result = []
    for row in case.rows:
        if row.status != OK or row.total_s is None:
            continue
        forward = statistics.median(row.forward_s)
        floor = next(iter(case.floors_s[row.objective].values()))
        extra = None if row.extra_bytes is None else row.extra_bytes / MIB
        colour = OURS if row.ours else PEERS
        result.append((row.key, colour, 1e3 * forward, 1e3 * row.total_s, 1e3 * floor, extra))
    return result


def _draw_times(axes: Axes, case: CaseResult) -> None:
    for place, (_, colour, forward, total, floor, _) in enumerate(_rows(case)):
        axes.barh(place, total, color=colour, alpha=0.6)
        axes.barh(place, min(forward, total), color=colour)
        axes.plot([floor, floor], [place - 0.4, place + 0.4], color="black", linewidth=1)
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(_rows(case))), [label for label, *_ in _rows(case)], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms; dark: forward, light: backward, line: floor", fontsize=8)
    axes.set_title(f"{case.title}: {case.shape}, {case.dtype}", fontsize=9, loc="left")
    axes.margins(x=0.1)


def _draw_memory(axes: Axes, case: CaseResult) -> None:
    rows = _rows(case)
    for place, (_, colour, _, _, _, extra) in enumerate(rows):
        if extra is not None:
            axes.barh(place, extra, color=colour)
        axes.text(extra or 0, place, " not measured" if extra is None else f" {extra:,.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.invert_yaxis()
    axes.set_xlabel("extra MiB at the peak", fontsize=8)
    axes.margins(x=0.15)
