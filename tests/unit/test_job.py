"""When the engine gives its memory to the trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gspo_megatron import job as job_module
from gspo_megatron import sft
from gspo_megatron.config import (
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    SftLoopConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import Job, build_job
from gspo_megatron.parallel import ParallelLayout

GROUPS = ProcessGroups(ParallelLayout(data=2), 1, *[None] * 10)  # type: ignore[arg-type]


class Calls:
    """Stands for whatever takes part, and notes what was done with it, in order."""

    stop_token_ids = (9,)

    def __init__(self) -> None:
        self.made: list[str] = []

    def note(self, name: str) -> Any:
        return lambda *arguments, **options: self.made.append(name)

    def rest(self) -> None:
        self.made.append("rest")

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        self.made.append(name)
        yield self
        self.made.append(f"close {name}")


def test_servers_give_their_memory_before_the_policy_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    config = TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="unused"),
        rollout=RolloutConfig(engine="sglang"),
    )
    monkeypatch.setattr(job_module.Tokenizer, "load", lambda path: calls)
    monkeypatch.setattr(job_module, "build_task", lambda *arguments, **options: None)
    monkeypatch.setattr(job_module, "Scorer", lambda *arguments: contextlib.nullcontext())
    monkeypatch.setattr(job_module, "open_sglang", lambda *arguments, **options: calls.opened("servers"))
    with build_job(config, GROUPS):
        calls.made.append("policy")
    assert calls.made == ["servers", "rest", "policy", "close servers"]


@pytest.mark.parametrize(
    ("step", "made"), [(1, []), (2, ["sync", "evaluate", "rest"]), (5, ["sync", "evaluate", "rest"])]
)
def test_servers_rest_after_an_evaluation_between_steps(
    step: int, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Any = Calls()
    config = SftConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="unused"),
        sft=SftLoopConfig(steps=5),
        eval=EvalConfig(every=2),
    )
    monkeypatch.setattr(sft, "sync_weights", calls.note("sync"))
    monkeypatch.setattr(sft, "evaluate", calls.note("evaluate"))
    job = Job(config, GROUPS, calls, calls, None, calls, torch.device("cpu"))
    sft._evaluate_if_due(job, calls, step)
    assert calls.made == made
