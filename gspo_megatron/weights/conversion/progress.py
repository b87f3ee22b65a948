"""How far a conversion is: a live bar with bytes and time left on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gspo_megatron.progress import format_duration

_LINE_EVERY_S = 10.0


class ByteProgress:
    """Progress over a known number of bytes, from several threads. A context manager.

    Args:
        total: bytes.
        label: what is being done.
        stream: where to print; standard error if None, for standard output holds results.
        clock: seconds, monotonic.
    """

    def __init__(
        self, total: int, label: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.label, self.done = total, label, 0
        self._stream, self._clock = sys.stderr if stream is None else stream, clock
        self._start_s = self._last_line_s = clock()
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def __enter__(self) -> ByteProgress:
        console = Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=console)
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self.done += nbytes
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done)
            elif self._clock() - self._last_line_s >= _LINE_EVERY_S:
                self._last_line_s = self._clock()
                self._print(self._line())

    def _line(self) -> str:
        passed_s = self._clock() - self._start_s
        left_s = passed_s * (self.total - self.done) / max(1, self.done)
        return f"{self.label} {self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB  {format_duration(left_s)} left"

    def note(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
