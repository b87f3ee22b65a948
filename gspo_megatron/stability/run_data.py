"""Reading what a run wrote into its folder."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gspo_megatron.errors import UserError
from gspo_megatron.metrics import LIST_METRICS, METRICS, NON_FINITE, TEXT_METRICS
from gspo_megatron.stability.watchdog import Facts, Finding, review

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder's records."""

    name: str  # short and different for every run of one report
    folder: Path
    rows: list[Row]  # metrics.jsonl by step, ascending; numbers are finite
    samples: list[Row]  # samples.jsonl, in the order written
    config: dict[str, Any] | None  # config.toml; None if the folder has none
    notes: list[str] = field(default_factory=list)  # what a reader must know about the records
    findings: list[Finding] = field(default_factory=list)  # the watchdog's; [] without a config

    def values(self, key: str) -> np.ndarray:
        """[rows] float64, NaN where not measured. Of a metric of one number."""
        return np.array([math.nan if row.get(key) is None else row[key] for row in self.rows], dtype=float)

    @property
    def steps(self) -> np.ndarray:
        """[rows] rollout batches done."""
        return self.values("step")

    def non_finite_steps(self, key: str) -> np.ndarray:
        """Steps at which the metric was NaN or infinite."""
        return np.array([row["step"] for row in self.rows if key in row.get(NON_FINITE, {})], dtype=float)

    @property
    def engines(self) -> str:
        """Names of the rollout engines, as the run wrote them."""
        names = dict.fromkeys(str(row["engine"]) for row in self.rows if row.get("engine") is not None)
        return " / ".join(names) or "not recorded"


def _read_json_lines(path: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    """(line number, object) of every line, and notes. A last line that is not JSON is what a killed run leaves."""
    # Split at \n only: str.splitlines also splits at letters that JSON text may hold.
    lines = [(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    rows: list[tuple[int, Row]] = []
    for number, line in lines:
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == lines[-1][0]:
                return rows, [f"{path.name}: line {number}, the last, is incomplete and was left out"]
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error}); repair or remove this line. "
                "A run that was killed leaves only its last line incomplete"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {row!r} is no JSON object; repair or remove this line")
        rows.append((number, row))
    return rows, []


def _checked(path: Path, number: int, row: Row) -> Row:
    """The row with known types: an integer step, finite numbers, the non-finite ones named."""
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise UserError(f"{path}, line {number}: step={step!r} is no integer; repair or remove this line")
    row = dict(row)
    bad = row.get(NON_FINITE, {})
    if not isinstance(bad, Mapping):
        raise UserError(f"{path}, line {number}: {NON_FINITE}={bad!r} is no object; repair or remove this line")
    bad = dict(bad)
    for key in METRICS.keys() - TEXT_METRICS:
        value = row.get(key)
        if value is None:
            continue
        if key in LIST_METRICS:
            if not isinstance(value, list) or not all(x is None or isinstance(x, int | float) for x in value):
                raise UserError(
                    f"{path}, line {number}: {key}={value!r} is no list of numbers; repair or remove this line"
                )
            bad |= {f"{key}/{i}": str(x) for i, x in enumerate(value) if x is not None and not math.isfinite(x)}
            row[key] = [x if x is not None and math.isfinite(x) else None for x in value]
            continue
        if not isinstance(value, int | float):
            raise UserError(f"{path}, line {number}: {key}={value!r} is no number; repair or remove this line")
        if not math.isfinite(value):  # Python's reader takes NaN and Infinity, which other writers produce
            bad[key] = str(value)
            row[key] = None
    row[NON_FINITE] = bad
    return row


def read_metrics(path: Path) -> tuple[list[Row], list[str]]:
    """(rows by step, notes for a reader) of a metrics.jsonl.

    Raises:
        UserError: it is empty, or has a malformed line before the last one.
    """
    lines, notes = _read_json_lines(path)
    if not lines:
        reason = "no complete line" if notes else "nothing"
        raise UserError(f"{path} holds {reason}: the run has not finished its first rollout batch; wait, or rerun it")
    by_step: dict[int, Row] = {}
    for number, line in lines:
        row = _checked(path, number, line)
        by_step[row["step"]] = row
    if len(by_step) < len(lines):
        repeated = len(lines) - len(by_step)
        notes.append(f"{repeated} rollout batches were run again (a resumed run); the later records are shown")
    rows = [by_step[step] for step in sorted(by_step)]
    hurt = {key: sum(any(name.split("/")[0] == key for name in row[NON_FINITE]) for row in rows) for key in METRICS}
    for key, count in hurt.items():
        if count:
            notes.append(f"{key} was NaN or infinite in {count} of {len(rows)} rows")
    return rows, notes


def _read_config(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    if not path.is_file():
        return None, ["config.toml is missing: the clip band and the config are not shown"]
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), []
    except ValueError as error:
        raise UserError(
            f"{path} is no valid TOML ({error}); repair it, or move it away to report without it"
        ) from error


def _read_samples(path: Path) -> tuple[list[Row], list[str]]:
    if not path.is_file():
        return [], ["samples.jsonl is missing: no rollouts are shown"]
    lines, notes = _read_json_lines(path)
    return [row for _, row in lines], notes


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no folder, no or an empty metrics.jsonl, or a malformed line before the last one.
    """
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; give the run.folder of a run")
    metrics_path = folder / "metrics.jsonl"
    if not metrics_path.is_file():
        raise UserError(f"{folder} holds no metrics.jsonl; give the run.folder of a run that has started")
    rows, notes = read_metrics(metrics_path)
    config, config_notes = _read_config(folder / "config.toml")
    samples, sample_notes = _read_samples(folder / "samples.jsonl")
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        rows=rows,
        samples=samples,
        config=config,
        notes=[*notes, *config_notes, *sample_notes],
        findings=review(rows, Facts.of(config)) if config is not None else [],
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two are equal, each with as many parents as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = [os.path.join(*p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run folder is given twice: {', '.join(str(f) for f in folders)}; give each once")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted config keys that differ, each with its value per run (None: not set or no config).

    run.folder is left out: it differs always, and names the run already.
    """
    flats = [flatten(run.config or {}) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat if key != "run.folder")
    found = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values[1:])}


def pick_samples(samples: Sequence[Row], count: int = 3) -> dict[str, list[Row]]:
    """The best, the worst and the longest rollouts; of equal ones the latest, so that the end of the run shows.

    Rollouts without a reward are neither best nor worst. Length is that of the response's text, in characters.
    """
    latest_first = list(reversed(samples))
    scored = [s for s in latest_first if isinstance(s.get("reward"), int | float)]
    return {
        "best": sorted(scored, key=lambda s: -s["reward"])[:count],
        "worst": sorted(scored, key=lambda s: s["reward"])[:count],
        "longest": sorted(latest_first, key=lambda s: -len(str(s.get("response", ""))))[:count],
    }
