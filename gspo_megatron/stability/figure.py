"""The picture of one or several runs. Colours are Okabe and Ito's, which colour-blind readers can tell apart.

Without pyplot: a figure here touches no global state of matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gspo_megatron.stability.quantities import (
    clip_band,
    first_last_gain,
    first_last_means,
    moving_mean,
    smoothing_window,
)
from gspo_megatron.stability.run_data import Run

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """Colours of a light or a dark page."""

    background: str
    text: str
    faint: str  # grid, frames, bands
    runs: tuple[str, ...]  # one colour a run


LIGHT = Theme("#ffffff", "#1a1a1a", "#c8c8c8", (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK))
DARK = Theme("#16181c", "#e8e8e8", "#4a4d54", (SKY, ORANGE, GREEN, PURPLE, VERMILLION, YELLOW, "#ffffff"))

MAX_RUNS = len(LIGHT.runs)

CLIP_KINDS = {
    "clip_fraction_sequence": ("sequences", "-"),
    "clip_fraction_token": ("tokens", ":"),
    "clip_fraction_positive": ("sequences, advantage > 0", "--"),
    "clip_fraction_negative": ("sequences, advantage < 0", "-."),
}
TIME_KINDS = {
    "time_rollout_s": ("rollout", BLUE, "//"),
    "time_logprobs_s": ("log-probs", ORANGE, ""),
    "time_train_s": ("train", GREEN, "\\\\"),
    "time_reshard_s": ("reshard", PURPLE, ""),
}


def _plot(ax: Axes, x: np.ndarray, y: np.ndarray, **style: object) -> None:
    """A line with gaps where nothing was measured; points where a line would not show."""
    known = np.isfinite(y)
    alone = known & ~np.append(known[1:], False) & ~np.insert(known[:-1], 0, False)
    (line,) = ax.plot(x, y, **style)  # type: ignore[arg-type]
    if alone.any():
        ax.plot(x[alone], y[alone], ".", color=line.get_color(), alpha=line.get_alpha())


def _smooth(y: np.ndarray) -> tuple[np.ndarray, int]:
    window = smoothing_window(int(np.isfinite(y).sum()))
    return moving_mean(y, window), window


def _measured(runs: Sequence[Run], *keys: str) -> bool:
    return any(np.isfinite(run.values(key)).any() for run in runs for key in keys)


def _not_measured(ax: Axes, theme: Theme) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=theme.text, fontsize=13)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def _mark_non_finite(ax: Axes, runs: Sequence[Run], theme: Theme, *keys: str) -> list[Line2D]:
    """Crosses along the top where a value was NaN or infinite. Returns their legend entry, if any."""
    handles: list[Line2D] = []
    for run, color in zip(runs, theme.runs, strict=False):
        steps = np.unique(np.concatenate([run.non_finite_steps(key) for key in keys]))
        if steps.size:
            ax.plot(
                steps, np.full(steps.size, 0.97), "x", color=color, transform=ax.get_xaxis_transform(), clip_on=False
            )
            handles = [Line2D([], [], color=theme.text, ls="", marker="x", label="NaN or infinite")]
    return handles


def _legend(ax: Axes, handles: Sequence[object], theme: Theme, *, columns: int = 3) -> None:
    """Below the axes, where it covers no data."""
    if handles:
        ax.legend(
            handles=list(handles),  # type: ignore[arg-type]
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=9,
            labelcolor=theme.text,
            handlelength=2.6,
        )


def _plot_raw_and_smooth(ax: Axes, runs: Sequence[Run], theme: Theme, key: str) -> list[Line2D]:
    """Faint raw values under their moving mean, a colour a run."""
    windows = set()
    for run, color in zip(runs, theme.runs, strict=False):
        y = run.values(key)
        smooth, window = _smooth(y)
        windows.add(window)
        if window > 1:
            _plot(ax, run.steps, y, color=color, alpha=0.35, lw=0.9)
        _plot(ax, run.steps, smooth, color=color, lw=2.0)
    return _batch_legend(windows, theme, "mean")


def _batch_legend(windows: set[int], theme: Theme, mean: str) -> list[Line2D]:
    """Entries for faint raw values and the moving mean; windows of one batch have no mean to show."""
    if windows == {1}:
        return [Line2D([], [], color=theme.text, lw=2.0, label="each batch")]
    span = "–".join(str(w) for w in sorted({min(windows), max(windows)}))
    return [
        Line2D([], [], color=theme.text, alpha=0.45, lw=0.9, label="each batch"),
        Line2D([], [], color=theme.text, lw=2.0, label=f"{mean} of {span} batches"),
    ]


def _reward(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    ax.set_title("Reward")
    ax.set_ylabel("mean reward of a batch")
    if not _measured(runs, "reward_mean", "eval_reward_mean"):
        return _not_measured(ax, theme)
    handles = _plot_raw_and_smooth(ax, runs, theme, "reward_mean") if _measured(runs, "reward_mean") else []
    if len(runs) == 1:
        _mark_first_and_last(ax, runs[0], theme)
    for run, color in zip(runs, theme.runs, strict=False):
        evals, half = run.values("eval_reward_mean"), run.values("eval_reward_ci95")
        known = np.isfinite(evals)
        if known.any():
            ax.errorbar(
                run.steps[known], evals[known], yerr=np.nan_to_num(half[known]), fmt="D", ms=5.5, capsize=3, lw=1.4,
                color=color, mec=theme.text, mew=0.8, zorder=7,
            )  # fmt: skip
    if _measured(runs, "eval_reward_mean"):
        interval = ", 95 % interval" if _measured(runs, "eval_reward_ci95") else ""
        handles.append(Line2D([], [], color=theme.text, marker="D", ls="", ms=5.5, label=f"held-out{interval}"))
    handles += _mark_non_finite(ax, runs, theme, "reward_mean", "eval_reward_mean")
    _legend(ax, handles, theme)


def _mark_first_and_last(ax: Axes, run: Run, theme: Theme) -> None:
    """The two means that make the gain, as lines across the panel; labelled where a rising curve leaves room."""
    means = first_last_means(run.rows, "reward_mean")
    if means is None:
        return
    first, last = means
    ax.set_title(f"Reward: {last - first:+.3f} (last 5 batches against first 5)")
    for mean, name, x, align in ((first, "first 5", 0.985, "right"), (last, "last 5", 0.015, "left")):
        ax.axhline(mean, color=theme.text, lw=1.1, ls=(0, (1, 2)))
        above = (mean == max(first, last)) == (name == "last 5")
        ax.annotate(
            f"{name}: {mean:.3f}", (x, mean), xycoords=("axes fraction", "data"), xytext=(0, 4 if above else -4),
            textcoords="offset points", ha=align, va="bottom" if above else "top", fontsize=11, color=theme.text,
            zorder=8, bbox={"facecolor": theme.background, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip


def _clip_fractions(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    ax.set_title("Clipped share by kind")
    ax.set_ylabel("clipped share (%)")
    if not _measured(runs, *CLIP_KINDS):
        return _not_measured(ax, theme)
    handles = []
    single = dict(zip(CLIP_KINDS, theme.runs, strict=False))
    for key, (label, style) in CLIP_KINDS.items():
        missing = "" if _measured(runs, key) else " (not measured)"
        for run, color in zip(runs, theme.runs, strict=False):
            smooth, _ = _smooth(run.values(key))
            # One run: a colour a kind. Several: a colour a run, kinds by their dashes.
            _plot(ax, run.steps, 100 * smooth, ls=style, lw=1.8, color=single[key] if len(runs) == 1 else color)
        color = single[key] if len(runs) == 1 else theme.text
        handles.append(Line2D([], [], color=color, ls=style, lw=1.8, label=label + missing))
    ax.set_ylim(bottom=0)
    _legend(ax, handles + _mark_non_finite(ax, runs, theme, *CLIP_KINDS), theme, columns=2)


def _log_ratios(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    keys = [f"log_ratio_sequence_{q}" for q in ("p01", "p50", "p99")]
    ax.set_title("Sequence log-ratio, log s")
    ax.set_ylabel("log s (nats)")
    if not _measured(runs, *keys):
        return _not_measured(ax, theme)
    for run, color in zip(runs, theme.runs, strict=False):
        low, middle, high = (run.values(key) for key in keys)
        ax.fill_between(run.steps, low, high, color=color, alpha=0.25 if len(runs) == 1 else 0.12, lw=0)
        for edge in (low, high):
            _plot(ax, run.steps, edge, color=color, lw=0.8)
        _plot(ax, run.steps, middle, color=color, lw=1.8)
    handles: list[object] = [
        Line2D([], [], color=theme.text, lw=1.8, label="median"),
        Line2D([], [], color=theme.text, lw=0.8, label="1st and 99th percentile"),
    ]
    handles += _clip_bands(ax, runs, theme)
    _legend(ax, handles + _mark_non_finite(ax, runs, theme, *keys), theme)


def _clip_bands(ax: Axes, runs: Sequence[Run], theme: Theme) -> list[Line2D]:
    """Dashed lines at each run's clip. A clip far outside the data is named, not drawn: it would flatten the data."""
    bottom, top = ax.get_ylim()
    reach = 3 * max(abs(bottom), abs(top))
    bands: dict[tuple[float, float, str], list[int]] = {}
    for i, run in enumerate(runs):
        band = clip_band(run.config)
        if band is not None:
            # GRPO clips tokens; the sequence's ratio is a mean of theirs.
            per_token = (run.config or {}).get("algorithm", {}).get("name") == "grpo"
            bands.setdefault((*band, " of tokens" if per_token else ""), []).append(i)
    handles = []
    for (low, high, kind), members in bands.items():
        color = theme.text if len(bands) == 1 else theme.runs[members[0]]
        label = f"clip{kind} {low:.2g} / {high:+.2g}"
        if max(abs(low), abs(high)) > reach:
            handles.append(Line2D([], [], ls="", label=f"{label}: off the scale"))
            continue
        for bound in (low, high):
            ax.axhline(bound, color=color, ls=(0, (4, 3)), lw=1.3)
        handles.append(Line2D([], [], color=color, ls=(0, (4, 3)), lw=1.3, label=label))
    return handles


def _entropy(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    ax.set_title("Entropy of the policy")
    ax.set_ylabel("entropy (nats a token)")
    if not _measured(runs, "entropy"):
        return _not_measured(ax, theme)
    handles = _plot_raw_and_smooth(ax, runs, theme, "entropy")
    ax.set_ylim(bottom=0)
    _legend(ax, handles + _mark_non_finite(ax, runs, theme, "entropy"), theme)


def _label_log_axis(ax: Axes) -> None:
    """Plain numbers, and at least three of them: the axis spans a factor of 4 or more."""
    low, high = ax.get_ylim()
    widen = math.sqrt(max(1.0, 4 * low / high))
    low, high = low / widen, high * widen
    ax.set_ylim(low, high)
    labelled = (1, 2, 5) if high / low > 9 else (1, 2, 3, 4, 5, 6, 8)

    def label(value: float, _position: object) -> str:
        digit = round(value / 10.0 ** math.floor(math.log10(value) + 1e-9), 6)
        return f"{value:g}" if digit in labelled else ""

    ax.yaxis.set_major_formatter(FuncFormatter(label))
    ax.yaxis.set_minor_formatter(FuncFormatter(label))


def _grad_norm(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    ax.set_title("Gradient norm before clipping")
    ax.set_ylabel("gradient norm (log scale)")
    if not _measured(runs, "grad_norm"):
        return _not_measured(ax, theme)
    windows: set[int] = set()
    zeros: list[Line2D] = []
    for run, color in zip(runs, theme.runs, strict=False):
        y = run.values("grad_norm")
        zero = y <= 0
        if zero.any():  # a log scale has no zero: marks along the bottom
            ax.plot(run.steps[zero], np.full(zero.sum(), 0.03), "v", color=color, transform=ax.get_xaxis_transform())
            zeros = [Line2D([], [], color=theme.text, ls="", marker="v", label="zero")]
        logs = np.log(np.where(zero, math.nan, y))
        smooth, window = _smooth(logs)
        if window > 1:
            _plot(ax, run.steps, np.exp(logs), color=color, alpha=0.35, lw=0.9)
        _plot(ax, run.steps, np.exp(smooth), color=color, lw=2.0)
        windows.add(window)
    ax.set_yscale("log")
    _label_log_axis(ax)
    handles = _batch_legend(windows, theme, "geometric mean")
    _legend(ax, handles + zeros + _mark_non_finite(ax, runs, theme, "grad_norm"), theme)


def _times(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    ax.set_title("Time of a rollout batch" + ("" if len(runs) == 1 else ", mean"))
    ax.set_ylabel("time (s)")
    if not _measured(runs, *TIME_KINDS, "time_step_s"):
        return _not_measured(ax, theme)
    if len(runs) == 1:
        run = runs[0]
        parts = np.array([run.values(key) for key in TIME_KINDS])
        total = run.values("time_step_s")
        timed = np.isfinite(parts).any(axis=0) | np.isfinite(total)
        steps, parts, total = run.steps[timed], parts[:, timed], total[timed]
        edges = np.vstack([np.zeros(len(steps)), np.nancumsum(parts, axis=0)])
        for i, (label, color, hatch) in enumerate(TIME_KINDS.values()):
            known = np.isfinite(parts[i])
            ax.fill_between(
                steps, edges[i], edges[i + 1], where=known, step="mid", facecolor=color, alpha=0.85, hatch=hatch,
                edgecolor=theme.background, lw=0, label=label + ("" if known.any() else " (not measured)"),
            )  # fmt: skip
        if np.isfinite(total).any():
            ax.step(steps, total, where="mid", color=theme.text, lw=1.2, label="whole batch")
    else:
        _time_bars(ax, runs, theme)
    ax.set_ylim(bottom=0)
    _legend(ax, ax.get_legend_handles_labels()[0], theme)


def _time_bars(ax: Axes, runs: Sequence[Run], theme: Theme) -> None:
    """One stacked bar of mean times a run: areas of several runs over each other could not be read."""
    positions = np.arange(len(runs))
    base = np.zeros(len(runs))
    for key, (label, color, hatch) in TIME_KINDS.items():
        values = [run.values(key) for run in runs]
        means = np.array([v[np.isfinite(v)].mean() if np.isfinite(v).any() else math.nan for v in values])
        heights = np.nan_to_num(means)
        suffix = "" if np.isfinite(means).any() else " (not measured)"
        ax.bar(
            positions, heights, 0.6, bottom=base, color=color, hatch=hatch, edgecolor=theme.background, lw=0,
            label=label + suffix,
        )  # fmt: skip
        base += heights
    totals = [run.values("time_step_s") for run in runs]
    means = np.array([v[np.isfinite(v)].mean() if np.isfinite(v).any() else math.nan for v in totals])
    if np.isfinite(means).any():
        ax.hlines(means, positions - 0.38, positions + 0.38, color=theme.text, lw=2.0, label="whole batch")
    ax.set_xticks(positions, [_short(run.name) for run in runs], rotation=0 if len(runs) < 5 else 20)
    for tick, color in zip(ax.get_xticklabels(), theme.runs, strict=False):
        tick.set_color(color)
        tick.set_fontweight("bold")


def _short(name: str, length: int = 40) -> str:
    """A run's name as matplotlib text: not too long, "$" not taken for mathematics, a leading "_" not for hidden."""
    shown = name if len(name) <= length else f"…{name[1 - length :]}"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _run_label(run: Run) -> str:
    gain = first_last_gain(run.rows)
    return f"{_short(run.name)} ({_short(run.engines)})" + ("" if gain is None else f", reward {gain:+.3f}")


PANELS: tuple[Callable[[Axes, Sequence[Run], Theme], None], ...] = (
    _reward, _clip_fractions, _log_ratios, _entropy, _grad_norm, _times,
)  # fmt: skip


def _style(ax: Axes, theme: Theme) -> None:
    ax.set_facecolor(theme.background)
    ax.grid(True, color=theme.faint, lw=0.6, alpha=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=theme.text, labelsize=10)
    for name, spine in ax.spines.items():
        spine.set_color(theme.faint)
        spine.set_visible(name in ("left", "bottom"))


def build_figure(runs: Sequence[Run], *, dark: bool = False) -> Figure:
    """The six panels.

    Args:
        runs: at most MAX_RUNS, overlaid; each has its own colour.
        dark: for a dark page.
    """
    assert 1 <= len(runs) <= MAX_RUNS, f"{len(runs)} runs for {MAX_RUNS} colours"
    theme = DARK if dark else LIGHT
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.03, wspace=0.03)
    figure = Figure(figsize=(14, 14.5), dpi=100, layout=layout, facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(3, 2).flat)
    for panel, ax in zip(PANELS, axes, strict=True):
        _style(ax, theme)
        ax.set_xlabel("rollout batch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel(ax, runs, theme)
        ax.set_title(ax.get_title(), fontsize=14, color=theme.text, pad=10)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_color(theme.text)
            label.set_fontsize(11)
    if len(runs) == 1:
        figure.suptitle(
            f"{_short(runs[0].name)}  (rollout engine: {_short(runs[0].engines)})", fontsize=16, color=theme.text
        )
    else:
        axes[-1].set_xlabel("")
        figure.legend(
            handles=[
                Line2D([], [], color=color, lw=5, label=_run_label(run))
                for run, color in zip(runs, theme.runs, strict=False)
            ],
            loc="outside upper center", ncols=min(2, len(runs)), frameon=False, fontsize=13, labelcolor=theme.text,
        )  # fmt: skip
    return figure


def draw(runs: Sequence[Run], *, dark: bool = False) -> bytes:
    """The figure as a PNG file's bytes; arguments as build_figure's."""
    buffer = io.BytesIO()
    build_figure(runs, dark=dark).savefig(buffer, format="png")
    return buffer.getvalue()
