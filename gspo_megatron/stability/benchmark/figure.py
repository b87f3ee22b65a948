"""The benchmark's picture: one panel after another, as the spec asks for them. Means over seeds, with bands."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter

from gspo_megatron.stability.benchmark.cells import Placed, Plan
from gspo_megatron.stability.benchmark.page import level
from gspo_megatron.stability.benchmark.results import Result, column, number
from gspo_megatron.stability.benchmark.spec import Experiment, Panel, Spec
from gspo_megatron.stability.benchmark.statistics import bootstrap_band
from gspo_megatron.stability.figure import DARK, LIGHT, Theme

COLUMNS = 2
_STYLES = ("-", ":", "-.")
_REFERENCES = ("_predicted", "_independent")  # ends of the names of what measurements are held against
_TIME_POINTS = 120


@dataclass(frozen=True)
class Line:
    """One curve of a panel: a row a seed."""

    label: str
    x: np.ndarray  # [points]
    y: np.ndarray  # [seeds, points]; NaN where a seed has no value
    arm: int = -1  # place among the spec's arms, if the panel compares arms alone: its colour in every panel
    is_reference: bool = False  # a model's or a control's: dashed


def draw(spec: Spec, plan: Plan, results: Mapping[str, Result], *, dark: bool = False) -> bytes:
    """The figure as a PNG file's bytes."""
    panels = [(e, p) for e in spec.experiments for p in e.panels]
    theme = DARK if dark else LIGHT
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15, hspace=0.04, wspace=0.03)
    figure = Figure(figsize=(15, 5.6 * rows), dpi=90, layout=layout, facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(rows, COLUMNS)).flat)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for (experiment, panel), ax in zip(panels, axes, strict=False):
        _draw_panel(ax, spec, experiment, panel, plan, results, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(
    ax: Axes, spec: Spec, experiment: Experiment, panel: Panel, plan: Plan, results: Mapping[str, Result], theme: Theme
) -> None:
    ax.set_facecolor(theme.background)
    ax.grid(True, color=theme.faint, lw=0.6, alpha=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=theme.text, labelsize=10)
    for name, spine in ax.spines.items():
        spine.set_color(theme.faint)
        spine.set_visible(name in ("left", "bottom"))
    ax.set_title(f"{experiment.number}. {panel.title}", fontsize=13, color=theme.text, pad=10)
    ax.set_xlabel(panel.x_label or _X_LABELS.get(panel.kind, ""), color=theme.text, fontsize=11)
    ax.set_ylabel(panel.y_label, color=theme.text, fontsize=11)
    lines = panel_lines(spec, experiment, panel, plan, results)
    if not lines:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=theme.text)
        ax.set_xticks([])
        ax.set_yticks([])
        return
    ax.set_xscale(panel.x_scale)
    ax.set_yscale(panel.y_scale)
    # A colour an arm or metric; where colours run out, dashes go on.
    for place, line in enumerate(lines):
        i = place if line.arm < 0 else line.arm
        color = theme.runs[i % len(theme.runs)]
        style = "--" if line.is_reference else _STYLES[i // len(theme.runs) % len(_STYLES)]
        _draw_line(ax, line, color=color, style=style, is_log=panel.y_scale == "log")
    columns = 2 if max(len(line.label) for line in lines) < 45 else 1
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=columns,
        handlelength=3,
        frameon=False,
        fontsize=9,
        labelcolor=theme.text,
    )
    if panel.kind in ("factor", "mini_batches", "curve"):
        _label_levels(ax, lines)


_X_LABELS = {"batches": "rollout batch", "seconds": "time in rollout batches (s)", "mini_batches": "mini-batch"}


def _draw_line(ax: Axes, line: Line, *, color: str, style: str, is_log: bool) -> None:
    known = np.isfinite(line.y).any(0)
    x, y = line.x[known], line.y[:, known]
    if is_log:
        y = np.where(y > 0, y, np.nan)
        known = np.isfinite(y).any(0)
        x, y = x[known], y[:, known]
    if not x.size:
        ax.plot([], [], color=color, ls=style, label=f"{line.label}: none above 0" if is_log else line.label)
        return
    mean = np.nanmean(y, axis=0)
    marker = "o" if x.size <= 12 else ""
    ax.plot(x, mean, color=color, ls=style, lw=2, marker=marker, ms=5, label=line.label)
    if y.shape[0] > 1:
        low, high = bootstrap_band(y)
        if x.size > 1:
            ax.fill_between(x, low, high, color=color, alpha=0.16, lw=0)
        else:
            ax.vlines(x, low, high, color=color, lw=2)


def _label_levels(ax: Axes, lines: Sequence[Line]) -> None:
    """Ticks at the levels themselves where they are few enough not to run into each other."""
    levels = sorted({float(x) for line in lines for x in line.x})
    if len(levels) > 8 or (ax.get_xscale() == "log" and levels[0] <= 0):
        return
    ax.set_xticks(levels, [f"{x:g}" for x in levels])
    ax.xaxis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


def panel_lines(
    spec: Spec, experiment: Experiment, panel: Panel, plan: Plan, results: Mapping[str, Result]
) -> list[Line]:
    """The panel's curves from the cells that are done: those that differ in their seed alone make one."""
    planned = plan.find(experiment.name, panel.where)
    fixed = (key for key, value in panel.where.items() if not isinstance(value, list))
    hidden = {"seed", *fixed, *([panel.x] if panel.kind == "factor" else [])}
    groups: dict[tuple[Any, ...], list[Placed]] = {}
    for placed in planned:
        key = tuple((k, v) for k, v in placed.labels.items() if k not in hidden)
        groups.setdefault(key, []).append(placed)
    # Of all that is planned, so that names and colours are the same before everything is done.
    varying = {k for key in groups for k, v in key if any(dict(other).get(k) != v for other in groups)}
    compares_arms = varying == {"arm"} and len(panel.metrics) == 1
    lines = []
    for key, cells in groups.items():
        members = [p for p in cells if p.cell.id in results]
        if not members:
            continue
        arm = list(spec.arms).index(dict(key)["arm"]) if compares_arms else -1
        name = ", ".join(level(spec, k, v) for k, v in key if k in varying)
        for metric in panel.metrics:
            shown = panel.labels.get(metric, metric if len(panel.metrics) > 1 else "")
            label = ", ".join(filter(None, [name, shown])) or metric
            line = _LINES[panel.kind](panel, members, metric, results, label)
            if line is not None and np.isfinite(line.y).any():
                lines.append(replace(line, arm=arm, is_reference=metric.endswith(_REFERENCES)))
    return lines


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[seeds, points] with NaN behind the end of shorter ones."""
    size = max((row.size for row in rows), default=0)
    return np.array([np.append(row, np.full(size - row.size, np.nan)) for row in rows]).reshape(len(rows), size)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Trailing mean of up to 5 batches."""
    total = np.cumsum(np.insert(np.nan_to_num(values), 0, 0.0))
    count = np.cumsum(np.insert(np.isfinite(values).astype(float), 0, 0.0))
    start = np.maximum(np.arange(values.size) + 1 - 5, 0)
    end = np.arange(values.size) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[end] - total[start]) / (count[end] - count[start])


def _batches(
    panel: Panel, members: Sequence[Placed], metric: str, results: Mapping[str, Result], label: str
) -> Line | None:
    y = _stack([_smooth(column(results[p.cell.id], metric)) for p in members])
    return Line(label, np.arange(1, y.shape[1] + 1), y)


def _seconds(
    panel: Panel, members: Sequence[Placed], metric: str, results: Mapping[str, Result], label: str
) -> Line | None:
    """The metric over the summed time of rollout batches, until the first seed ends."""
    times = [np.cumsum(np.nan_to_num(column(results[p.cell.id], "time_step_s"))) for p in members]
    if any(t.size == 0 for t in times):
        return None
    grid = np.linspace(max(t[0] for t in times), min(t[-1] for t in times), _TIME_POINTS)
    rows = [
        np.interp(grid, t, _smooth(column(results[p.cell.id], metric))) for t, p in zip(times, members, strict=True)
    ]
    return Line(label, grid, np.array(rows))


def _mini_batches(
    panel: Panel, members: Sequence[Placed], metric: str, results: Mapping[str, Result], label: str
) -> Line | None:
    """Entry i of a list metric, mean over the run's batches."""
    rows = []
    for placed in members:
        lists = [v for v in results[placed.cell.id].columns.get(metric, []) if v is not None]
        if lists:
            table = np.array([[math.nan if x is None else x for x in v] for v in lists], dtype=float)
            rows.append(np.array([c[np.isfinite(c)].mean() if np.isfinite(c).any() else math.nan for c in table.T]))
    if not rows:
        return None
    y = _stack(rows)
    return Line(label, np.arange(1, y.shape[1] + 1), y)


def _factor(
    panel: Panel, members: Sequence[Placed], metric: str, results: Mapping[str, Result], label: str
) -> Line | None:
    name, _, reduce = metric.partition("|")
    levels = sorted({p.labels[panel.x] for p in members if panel.x in p.labels})
    seeds = sorted({p.labels["seed"] for p in members})
    y = np.full((len(seeds), len(levels)), np.nan)
    for p in members:
        if panel.x in p.labels:
            value = number(results[p.cell.id], name, reduce)
            y[seeds.index(p.labels["seed"]), levels.index(p.labels[panel.x])] = value
    return Line(label.replace(metric, name), np.array(levels, dtype=float), y) if levels else None


def _curve(
    panel: Panel, members: Sequence[Placed], metric: str, results: Mapping[str, Result], label: str
) -> Line | None:
    rows = [np.array(results[p.cell.id].curves.get(metric, []), dtype=float) for p in members]
    x = results[members[0].cell.id].curves.get(panel.x)
    if x is None or any(row.size != len(x) for row in rows):
        return None
    return Line(label, np.array(x), np.array(rows))


_LINES = {
    "batches": _batches,
    "seconds": _seconds,
    "mini_batches": _mini_batches,
    "factor": _factor,
    "curve": _curve,
}
