"""What a person sees while a run goes on: a live bar on a terminal, one plain line per batch in a batch log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

_MISSING = "–"


def format_number(value: float | None) -> str:
    """Three significant digits; a dash for a value that was not measured."""
    if value is None:
        return _MISSING
    return f"{float(value):.3g}"


def format_duration(seconds: float) -> str:
    """'42s', '3m05s' or '2h07m'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _figures(row: Mapping[str, Any]) -> list[str]:
    """The row's figures as 'name value'. A key the row lacks is left out; one that is None shows a dash."""
    shown = [] if "reward_mean" in row else [("loss", "loss")]  # the loss of a clipped policy objective tells nothing
    shown += [
        ("reward", "reward_mean"),
        ("clip", "clip_fraction_sequence"),
        ("entropy", "entropy"),
        ("grad norm", "grad_norm"),
    ]
    figures = [f"{name} {format_number(row[key])}" for name, key in shown if key in row]
    if row.get("eval_reward_mean") is not None:
        figures.append(f"eval {format_number(row['eval_reward_mean'])}")
    return figures


class Progress:
    """Progress over a known number of batches. A context manager.

    Args:
        total: batches of the whole run.
        label: what is being done, e.g. "train".
        enabled: False prints nothing (every rank but 0).
        completed: batches done before this process started (a resumed run).
        unit: what one update is called.
        stream: where to print; standard output if None. A live bar if it is a terminal, else plain lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        enabled: bool = True,
        completed: int = 0,
        unit: str = "batch",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._enabled = enabled
        self._done = completed
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._last_s = clock()
        # Time left follows the pace of late batches, evaluation included: lengths of responses drift in a run.
        self._paces_s: deque[float] = deque(maxlen=20)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._last_s = self._clock()
        console = Console(file=self._stream)
        if self._enabled and console.is_terminal and not console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}", markup=False, table_column=Column()),  # wraps if narrow
                console=console,
            )
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, figures="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, row: Mapping[str, Any]) -> None:
        """One more batch is done. `row` holds keys of METRICS; any of them may be None or absent."""
        now_s = self._clock()
        self._paces_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._done += 1
        if not self._enabled:
            return
        pace_s = row.get("time_step_s")
        figures = _figures(row)
        figures.append(f"{format_number(self._paces_s[-1] if pace_s is None else pace_s)} s/{self._unit}")
        left_s = max(0, self._total - self._done) * sum(self._paces_s) / len(self._paces_s)
        figures.append(f"{format_duration(left_s)} left")
        text = "  ".join(figures)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=text)
        else:
            self._print(f"{self._label} {self._done}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print a line of text above the bar, as it is."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        # A batch log's stream may not know "–" or a response's letters.
        encoding = self._stream.encoding or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding), file=self._stream, flush=True)
