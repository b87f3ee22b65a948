"""What a person sees of a conversion."""

from __future__ import annotations

import io

import pytest

from gspo_megatron.weights.conversion.progress import ByteProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_gets_a_line_every_ten_seconds_with_bytes_and_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with ByteProgress(4_000_000_000, "converting", stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now_s += 4
            progress.advance(100_000_000)
        progress.note("a note")
    assert stream.getvalue().splitlines() == [
        "converting 0.30/4.00 GB  2m28s left",
        "converting 0.60/4.00 GB  2m16s left",
        "converting 0.90/4.00 GB  2m04s left",
        "a note",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_bytes_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with ByteProgress(2_000_000_000, "converting", stream=stream) as progress:
        progress.advance(500_000_000)
        progress.note("a note [with brackets]")
        progress.advance(1_500_000_000)
    said = stream.getvalue()
    assert "a note [with brackets]" in said and "converting" in said
    assert "2.0/2.0 GB" in said and "0:00:00" in said
