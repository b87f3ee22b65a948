"""Which rollouts of a batch end in samples.jsonl, and what the watchdog remembers of earlier starts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_megatron.config import ModelConfig, RunConfig, TaskConfig, TrainConfig, WatchdogConfig
from gspo_megatron.recorder import Recorder, choose


def test_the_best_the_worst_and_the_longest_come_first() -> None:
    rewards = [0.5, 0.2, None, 0.9, 0.4, -0.1]
    lengths = [3, 4, 9, 5, 2, 6]
    assert choose(rewards, lengths, 3) == [3, 5, 2]
    assert choose(rewards, lengths, 5) == [3, 5, 2, 0, 1]
    assert choose(rewards, lengths, 100) == [3, 5, 2, 0, 1, 4]


def test_without_a_reward_the_longest_comes_first() -> None:
    assert choose([None, None, None], [1, 5, 2], 2) == [1, 0]
    assert choose([1.0], [4], 4) == [0]


def test_nothing_is_chosen_of_nothing_or_where_nothing_is_wanted() -> None:
    assert choose([], [], 4) == []
    assert choose([1.0, 0.0], [4, 5], 0) == []


HEALTHY: dict[str, Any] = {"reward_mean": 0.6, "grad_norm": 3.0, "grad_norm_max": 4.0, "kl_rollout_trainer": 0.0}
ROWS = [
    {},
    *[HEALTHY] * 6,
    HEALTHY | {"grad_norm_max": 33.0},  # 11 times the median
    HEALTHY | {"loss": math.nan},
    *[HEALTHY | {"reward_mean": 0.1, "kl_rollout_trainer": 0.1}] * 6,  # collapses, of a stale engine
]


def write_rows(folder: Path, first: int, end: int, done: int | None) -> tuple[list[str], list[float | None]]:
    """What a start says that writes ROWS[first:end], and the gradient norms that it leaves out before each row."""
    config = TrainConfig(
        run=RunConfig(folder=str(folder)),
        model=ModelConfig(path=""),
        task=TaskConfig(name=""),
        watchdog=WatchdogConfig(action="skip"),
    )
    job = SimpleNamespace(
        config=config, groups=SimpleNamespace(rank=0), engine=SimpleNamespace(name="none"), all_gather=lambda x: [x]
    )
    said: list[str] = []
    limits: list[float | None] = []
    with Recorder(job, "train", len(ROWS), done=done).open() as recorder:  # type: ignore[arg-type]
        recorder.display = SimpleNamespace(note=said.append, update=lambda row: None)  # type: ignore[assignment]
        for step in range(first, end):
            limits.append(recorder.skip_above())
            recorder.write(step, dict(ROWS[step]), None)
    return said, limits


@pytest.mark.parametrize("done", range(len(ROWS)))
def test_a_resumed_run_finds_what_a_run_without_a_break_finds(done: int, tmp_path: Path) -> None:
    whole, limits = write_rows(tmp_path / "whole", 0, len(ROWS), None)
    assert limits == [math.inf] * 6 + [30.0] * (len(ROWS) - 6)
    assert [line.split(":")[0] for line in whole] == [
        "watchdog, batch 7", "watchdog, batch 8", "watchdog, batch 9", "watchdog, batch 13"
    ]  # fmt: skip
    before, early = write_rows(tmp_path / "broken", 0, done + 1, None)
    after, late = write_rows(tmp_path / "broken", done + 1, len(ROWS), done)
    assert before + after == whole and early + late == limits
