from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from gspo_megatron.metrics import METRICS
from gspo_megatron.progress import Progress, format_duration, format_number


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    yield Terminal()


def test_a_log_gets_one_plain_line_per_batch() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "train", stream=stream, clock=clock) as progress:
        clock.now_s += 2.0
        progress.update(
            {"reward_mean": 0.51234, "clip_fraction_sequence": 0.1, "entropy": 1.5, "grad_norm": 0.25, "loss": 3.0,
             "time_step_s": 1.75, "eval_reward_mean": None}
        )  # fmt: skip
        clock.now_s += 4.0
        progress.update({"reward_mean": 0.6, "eval_reward_mean": 0.7})
    assert stream.getvalue().split("\n") == [
        "train 1/100  reward 0.512  clip 0.1  entropy 1.5  grad norm 0.25  1.75 s/batch  3m18s left",
        "train 2/100  reward 0.6  eval 0.7  4 s/batch  4m54s left",  # (2 + 4) / 2 × 98
        "",
    ]


def test_values_that_were_not_measured_show_a_dash() -> None:
    stream = io.StringIO()
    with Progress(3, "train", stream=stream, clock=Clock()) as progress:
        progress.update(dict.fromkeys(METRICS))
        progress.update({"reward_mean": float("nan"), "grad_norm": float("inf")})
        progress.update({})
    first, second, third, _ = stream.getvalue().split("\n")
    assert first == "train 1/3  reward –  clip –  entropy –  grad norm –  0 s/batch  0s left"
    assert "reward nan  grad norm inf" in second
    assert third == "train 3/3  0 s/batch  0s left"


def test_sft_shows_its_loss_and_a_resumed_run_goes_on_counting() -> None:
    stream = io.StringIO()
    with Progress(10, "sft", completed=7, unit="step", stream=stream, clock=Clock()) as progress:
        progress.update({"loss": 2.5})
    assert stream.getvalue() == "sft 8/10  loss 2.5  0 s/step  0s left\n"


def test_other_ranks_print_nothing(terminal: Terminal) -> None:
    for stream in (io.StringIO(), terminal):
        with Progress(2, "train", enabled=False, stream=stream) as progress:
            progress.update({"reward_mean": 1.0})
            progress.note("hello")
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_bar_and_notes_as_they_are(terminal: Terminal) -> None:
    with Progress(2, "train", stream=terminal) as progress:
        progress.update({"reward_mean": None, "entropy": 0.5})
        progress.note("[bold]not markup[/bold]")
        progress.update({"reward_mean": 0.75})
    text = terminal.getvalue()
    assert "━" in text and "2/2" in text and "reward 0.75" in text
    assert "[bold]not markup[/bold]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_the_terminal_is_given_back_when_the_run_fails(terminal: Terminal) -> None:
    with pytest.raises(RuntimeError, match="the run's own error"), Progress(2, "train", stream=terminal):
        raise RuntimeError("the run's own error")
    assert terminal.getvalue().count("\x1b[?25h") == 1


def test_a_terminal_without_a_cursor_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(1, "train", stream=terminal) as progress:
        progress.update({"reward_mean": 0.75})
    assert terminal.getvalue().startswith("train 1/1  reward 0.75")


def test_a_log_in_ascii_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    with Progress(1, "train", stream=io.TextIOWrapper(raw, encoding="ascii")) as progress:
        progress.update({"reward_mean": None})
        progress.note("漢 \ud800")
        assert raw.getvalue().decode("ascii").split("\n")[0].startswith("train 1/1  reward ?")


def test_formats() -> None:
    assert [format_duration(s) for s in (-1, 0, 59.4, 59.6, 185, 3599.6, 7620)] == [
        "0s", "0s", "59s", "1m00s", "3m05s", "1h00m", "2h07m",
    ]  # fmt: skip
    assert [format_number(v) for v in (None, 0, 0.123456, 1e-7)] == ["–", "0", "0.123", "1e-07"]
