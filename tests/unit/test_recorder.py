"""Which rollouts of a batch end in samples.jsonl, and what the watchdog remembers of earlier starts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_megatron.config import ModelConfig, RunConfig, TaskConfig, TrainConfig
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


def write_rows(folder: Path, first: int, end: int, done: int | None) -> list[str]:
    """What a start says that writes ROWS[first:end]."""
    config = TrainConfig(run=RunConfig(folder=str(folder)), model=ModelConfig(path=""), task=TaskConfig(name=""))
    job = SimpleNamespace(config=config, groups=SimpleNamespace(rank=0), engine=SimpleNamespace(name="none"))
    said: list[str] = []
    with Recorder(job, "train", len(ROWS), done=done).open() as recorder:  # type: ignore[arg-type]
        recorder.display = SimpleNamespace(note=said.append, update=lambda row: None)  # type: ignore[assignment]
        for step in range(first, end):
            recorder.write(step, dict(ROWS[step]), None)
    return said


@pytest.mark.parametrize("done", range(len(ROWS)))
def test_a_resumed_run_finds_what_a_run_without_a_break_finds(done: int, tmp_path: Path) -> None:
    whole = write_rows(tmp_path / "whole", 0, len(ROWS), None)
    assert [line.split(":")[0] for line in whole] == [
        "watchdog, batch 7", "watchdog, batch 8", "watchdog, batch 9", "watchdog, batch 13"
    ]  # fmt: skip
    before = write_rows(tmp_path / "broken", 0, done + 1, None)
    assert before + write_rows(tmp_path / "broken", done + 1, len(ROWS), done) == whole
