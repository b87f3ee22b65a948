"""What a cell left behind, and single numbers from it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_megatron.errors import UserError
from gspo_megatron.stability.quantities import has_collapsed

RESULT, FAILURE = "result.json", "failed.json"
_ENTRY = re.compile(r"(?P<name>\w+)\[(?P<index>-?\d+)\]")
_REDUCTION = re.compile(r"(?P<name>[a-z_]+)(:(?P<number>[0-9.eE+-]+))?")
REDUCTIONS = {
    "mean": False, "min": False, "max": False, "first": True, "last": True, "final": False, "collapsed": False,
    "batches_to": True, "seconds_to": True,
}  # fmt: skip
"""Name -> whether a number follows, as in last:10."""
WINDOW = 5  # batches of a moving mean


@dataclass(frozen=True)
class Result:
    """A finished cell. Columns and curves are of training runs and measurements; one of them may be empty."""

    seconds: float
    columns: Mapping[str, list[Any]]  # metric -> one value a rollout batch, None where not measured
    values: Mapping[str, float | None]  # single numbers of a measurement
    curves: Mapping[str, list[float]]  # of a measurement


def write_atomically(path: Path, value: Any) -> None:
    """The file is there whole or not at all, whatever kills this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(partial, path)


def read_result(cell_folder: Path) -> Result | None:
    """The cell's result; None if it has none yet."""
    path = cell_folder / RESULT
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Result(data["seconds"], data["columns"], data["values"], data["curves"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no result of a cell ({error!r}); remove it to run the cell again") from None


def read_rows(path: Path) -> dict[str, list[Any]]:
    """metrics.jsonl as columns, the row of the start (step 0) left out; metrics that were never measured too."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if row["step"] > 0]
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    return {key: [row.get(key) for row in rows] for key in keys}


def number(result: Result, metric: str, reduce: str) -> float:
    """One number of a cell; NaN where it was not measured.

    Args:
        metric: a value of a measurement, or a metric of a training run, `name[i]` for entry i of a list.
        reduce: of a training run's batches: mean, min, max, first:N, last:N (means), final (the last one measured),
            collapsed (0 or 1, whether the watchdog's reward_collapse held at any batch), batches_to:X or seconds_to:X
            (when the moving mean of 5 batches first reaches X).
    """
    if not reduce:
        value = result.values.get(metric)
        return math.nan if value is None else float(value)
    series = column(result, metric)
    return _reduce(reduce, series, column(result, "time_step_s"))


def split_entry(metric: str) -> tuple[str, bool]:
    """`name[i]` -> the name, and whether it names an entry of a list."""
    entry = _ENTRY.fullmatch(metric)
    return (entry["name"], True) if entry else (metric, False)


def column(result: Result, metric: str) -> np.ndarray:
    """[batches] a metric of a training run, NaN where not measured."""
    entry = _ENTRY.fullmatch(metric)
    values = result.columns.get(entry["name"] if entry else metric, [])
    if entry:
        index = int(entry["index"])
        values = [v[index] if v is not None and -len(v) <= index < len(v) else None for v in values]
    return np.array([math.nan if v is None else float(v) for v in values])


def moving_mean(values: np.ndarray) -> np.ndarray:
    """[n - 4] means of 5 batches in a row; of all where there are fewer."""
    window = min(WINDOW, values.size)
    return np.convolve(values, np.ones(window) / window, mode="valid")


def check_reduction(reduce: str) -> None:
    """Raises UserError if `reduce` is none, or lacks or has a number that it should not."""
    match = _REDUCTION.fullmatch(reduce)
    if match is None or match["name"] not in REDUCTIONS or (match["number"] is not None) != REDUCTIONS[match["name"]]:
        known = ", ".join(f"{name}:N" if takes_number else name for name, takes_number in REDUCTIONS.items())
        raise UserError(f'reduce="{reduce}" is no reduction of a run\'s batches; use one of {known}')


def _reduce(reduce: str, series: np.ndarray, seconds: np.ndarray) -> float:
    check_reduction(reduce)
    match = _REDUCTION.fullmatch(reduce)
    assert match is not None
    name, argument = match["name"], float(match["number"] or 0)
    known = series[np.isfinite(series)]
    if not known.size:
        return math.nan
    if name in ("mean", "min", "max"):
        return float(getattr(known, name)())
    if name in ("first", "last"):
        count = int(argument)
        return float((known[:count] if name == "first" else known[-count:]).mean())
    if name == "final":
        return float(known[-1])
    if name == "collapsed":
        return float(has_collapsed(known.tolist(), WINDOW))
    reached = np.flatnonzero(moving_mean(known) >= argument)
    if not reached.size:
        return math.nan
    batches = int(reached[0]) + min(WINDOW, known.size)
    return float(batches) if name == "batches_to" else float(np.nansum(seconds[:batches]))
