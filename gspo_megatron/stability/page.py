"""The report as one HTML file without outside assets. Everything a run wrote is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from gspo_megatron.metrics import LIST_METRICS, METRICS, TEXT_METRICS
from gspo_megatron.stability.figure import DARK, LIGHT
from gspo_megatron.stability.quantities import first_last_gain, first_last_means, last_list_means
from gspo_megatron.stability.run_data import Row, Run, config_differences, flatten, pick_samples

MAX_SHOWN_CHARACTERS = 20_000

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1a1a1a; --soft: #5a5a5a; --line: #d5d5d5; --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e8e8e8; --soft: #a8abb2; --line: #3a3d44; --box: #202329; }
}
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 1400px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.run, th.run { border-left: 1px solid var(--line); }
.soft { color: var(--soft); }
.notes li { border-left: 4px solid #E69F00; padding-left: 0.6rem; list-style: none; margin: 0.3rem 0; }
.notes { padding-left: 0; }
.sample { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 1rem;
          margin: 0.7rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; margin: 0.2rem 0 0.6rem;
      font-size: 0.85rem; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; border-radius: 2px; margin-right: 0.4em; }
"""


def _number(value: float | None) -> str:
    """At most four significant digits; long counts in full."""
    if value is None or math.isnan(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value)}"
    return f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already: whole <th> and <td> elements."""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _picture(light: bytes, dark: bytes) -> str:
    def uri(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"

    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uri(dark)}">'
        f'<img src="{uri(light)}" alt="Reward, clipped shares, log-ratio quantiles, entropy, gradient norm and times '
        'over the rollout batches"></picture>'
    )


def _swatches() -> str:
    """The runs' colours as CSS: the picture's, for either page."""
    light = "".join(f".run{i} {{ background: {c}; }} " for i, c in enumerate(LIGHT.runs))
    dark = "".join(f".run{i} {{ background: {c}; }} " for i, c in enumerate(DARK.runs))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"


def _run_heading(index: int, run: Run) -> str:
    return f'<span class="swatch run{index}"></span>{escape(run.name)}'


def _summary(runs: Sequence[Run]) -> str:
    head = ["<th>run</th>", "<th>rollout engine</th>"] + [
        f'<th class="number">{name}</th>'
        for name in (
            "batches",
            "reward, first 5",
            "reward, last 5",
            "gain",
            "held-out before",
            "held-out after",
            "time",
        )
    ]
    rows = []
    for i, run in enumerate(runs):
        means = first_last_means(run.rows, "reward_mean")
        evals = [row for row in run.rows if row.get("eval_reward_mean") is not None]
        first, last = means or (None, None)
        time_s = run.values("time_step_s")
        known = time_s[np.isfinite(time_s)]
        cells = [
            str(int(np.isfinite(run.values("reward_mean")).sum())),
            _number(first),
            _number(last),
            _number(first_last_gain(run.rows)),
            _with_interval(evals[0]) if len(evals) > 1 else "–",
            _with_interval(evals[-1]) if evals else "–",
            f"{known.sum() / 60:.1f} min" if known.size else "–",
        ]
        rows.append(
            [f"<td>{_run_heading(i, run)}</td>", f"<td>{escape(run.engines)}</td>"]
            + [f'<td class="number">{cell}</td>' for cell in cells]
        )
    return _table(head, rows)


def _with_interval(row: Row) -> str:
    half = row.get("eval_reward_ci95")
    shown = _number(row["eval_reward_mean"]) + ("" if half is None else f" ± {_number(half)}")
    return f'{shown} <span class="soft">(batch {row["step"]})</span>'


def _notes(runs: Sequence[Run]) -> str:
    items = [
        f"<li>{escape(run.name) + ': ' if len(runs) > 1 else ''}{escape(note)}</li>"
        for run in runs
        for note in [*run.notes, *(f"watchdog, batch {f.step}: {f.message}" for f in run.findings)]
    ]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _metrics_table(runs: Sequence[Run]) -> str:
    columns = ("first 5", "last 5", "min", "max")
    head = ["<th>metric</th>", "<th>meaning</th>"]
    for i, run in enumerate(runs):
        name = f"{_run_heading(i, run)}<br>" if len(runs) > 1 else ""
        for j, column in enumerate(columns):
            head.append(f'<th class="number{" run" if j == 0 else ""}">{name if j == 0 else ""}{column}</th>')
    rows, missing = [], []
    for key, meaning in METRICS.items():
        if key in TEXT_METRICS | LIST_METRICS or key == "step":
            continue
        values = [run.values(key) for run in runs]
        if not any(np.isfinite(v).any() for v in values):
            missing.append(key)
            continue
        cells = [f"<td><code>{key}</code></td>", f'<td class="soft">{escape(meaning)}</td>']
        for run, v in zip(runs, values, strict=True):
            first, last = first_last_means(run.rows, key) or (None, None)
            known = v[np.isfinite(v)]
            low, high = (known.min(), known.max()) if known.size else (None, None)
            for j, value in enumerate((first, last, low, high)):
                cells.append(f'<td class="number{" run" if j == 0 else ""}">{_number(value)}</td>')
        rows.append(cells)
    absent = ", ".join(f"<code>{key}</code>" for key in missing)
    note = f'<p class="soft">Not measured: {absent}.</p>' if missing else ""
    return (
        _table(head, rows) + '<p class="soft">First 5 and last 5: mean over the first and last five measurements; '
        "–: not measured, or fewer than ten measurements.</p>" + note
    )


def _lists_table(runs: Sequence[Run]) -> str:
    """What was measured of each mini-batch or MoE layer; empty without such metrics."""
    rows = []
    for key, meaning in METRICS.items():
        lists = [last_list_means(run.rows, key) if key in LIST_METRICS else None for run in runs]
        if all(values is None for values in lists):
            continue
        cells = [f"<td><code>{key}</code></td>", f'<td class="soft">{escape(meaning)}</td>']
        cells += [f'<td class="run">{" · ".join(map(_number, values or [])) or "–"}</td>' for values in lists]
        rows.append(cells)
    if not rows:
        return ""
    names = [_run_heading(i, run) if len(runs) > 1 else "last 5" for i, run in enumerate(runs)]
    head = ["<th>metric</th>", "<th>meaning</th>", *(f'<th class="run">{name}</th>' for name in names)]
    return (
        "<h3>By mini-batch and by MoE layer</h3>"
        + _table(head, rows)
        + '<p class="soft">In order, from the first; each the mean over the last five measurements.</p>'
    )


def _value(value: Any) -> str:
    return '<span class="soft">not set</span>' if value is None else f"<code>{escape(str(value))}</code>"


def _configs(runs: Sequence[Run]) -> str:
    parts = []
    if len(runs) > 1:
        differences = config_differences(runs)
        head = ["<th>setting</th>"] + [f'<th class="run">{_run_heading(i, run)}</th>' for i, run in enumerate(runs)]
        rows = [
            [f"<td><code>{escape(key)}</code></td>"] + [f'<td class="run">{_value(v)}</td>' for v in values]
            for key, values in differences.items()
        ]
        parts.append("<h2>Config differences</h2>")
        parts.append(_table(head, rows) if rows else "<p>None: the runs have the same config.</p>")
    else:
        parts.append("<h2>Config</h2>")
    for run in runs:
        if run.config is None:
            parts.append(f"<p>{escape(run.name)} has no config.toml.</p>")
            continue
        rows = [[f"<td><code>{escape(k)}</code></td>", f"<td>{_value(v)}</td>"] for k, v in flatten(run.config).items()]
        table = _table(["<th>setting</th>", "<th>value</th>"], rows)
        parts.append(f"<details><summary>All settings of {escape(run.name)}</summary>{table}</details>")
    return "\n".join(parts)


def _clipped_text(text: Any) -> str:
    shown = str(text)
    if len(shown) <= MAX_SHOWN_CHARACTERS:
        return escape(shown)
    more = len(shown) - MAX_SHOWN_CHARACTERS
    return f'{escape(shown[:MAX_SHOWN_CHARACTERS])}<span class="soft"> … {more} more characters in samples.jsonl</span>'


def _sample(sample: Row) -> str:
    facts = []
    for key, name in (
        ("step", "batch"),
        ("reward", "reward"),
        ("advantage", "advantage"),
        ("finish_reason", "finish reason"),
        ("policy_version", "policy version"),
    ):
        value = sample.get(key)
        shown = _number(value) if isinstance(value, int | float) else "–" if value is None else escape(str(value))
        facts.append(f"{name} <b>{shown}</b>")
    return (
        f'<div class="sample"><div class="soft">{" · ".join(facts)}</div>'
        f'<div class="soft">prompt</div><pre>{_clipped_text(sample.get("prompt", ""))}</pre>'
        f'<div class="soft">response</div><pre>{_clipped_text(sample.get("response", ""))}</pre></div>'
    )


def _samples(runs: Sequence[Run]) -> str:
    parts = ["<h2>Rollouts</h2>"]
    for i, run in enumerate(runs):
        if len(runs) > 1:
            parts.append(f"<h3>{_run_heading(i, run)}</h3>")
        if not run.samples:
            parts.append("<p>No rollouts were recorded.</p>")
            continue
        picked = pick_samples(run.samples)
        for title in ("best", "worst", "longest"):
            body = "".join(_sample(s) for s in picked[title]) or "<p>None was scored.</p>"
            parts.append(f"<details{' open' if len(runs) == 1 else ''}><summary>{title.capitalize()}</summary>{body}")
            parts.append("</details>")
    parts.append('<p class="soft">Picked from samples.jsonl, which holds a few rollouts of each batch.</p>')
    return "\n".join(parts)


def render(runs: Sequence[Run], *, light_png: bytes, dark_png: bytes) -> str:
    """The report's HTML."""
    title = escape(" vs ".join(run.name for run in runs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{_swatches()}</style>
</head>
<body>
<h1>{title}</h1>
{_summary(runs)}
{_notes(runs)}
<h2>Curves</h2>
{_picture(light_png, dark_png)}
<h2>Metrics</h2>
{_metrics_table(runs)}
{_lists_table(runs)}
{_configs(runs)}
{_samples(runs)}
</body>
</html>
"""
