"""Scorer: what is scored, where it runs, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import UserError
from gspo_megatron.tasks import build
from gspo_megatron.tasks.base import IsolatedReward, Split, Task
from gspo_megatron.tasks.scoring import Scorer
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport


class Recorder:
    """A score that keeps what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str) -> float:
        self.seen.append(text)
        return 0.0


class FunctionTask:
    """A task with the given score, in process."""

    name = "function"
    isolated: IsolatedReward | None = None

    def __init__(self, function: Callable[[str], Any]) -> None:
        self._function = function

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        return [Prompt(i, "q>", [83, 32], {"answer": "a"}) for i in range(start, start + count)]

    def answer(self, prompt: Prompt) -> str:
        return "a"

    def score(self, prompt: Prompt, response_text: str) -> float:
        return self._function(response_text)


def rollout(prompt: Prompt, response: list[int], tokenizer: Tokenizer) -> Rollout:
    ids = torch.tensor(prompt.token_ids + response)
    mask = torch.arange(len(ids)) >= len(prompt.token_ids)
    stopped = bool(response) and response[-1] in tokenizer.stop_token_ids
    return Rollout(
        prompt_id=prompt.id,
        token_ids=ids,
        response_mask=mask,
        rollout_logprobs=torch.zeros(len(ids)),
        policy_versions=torch.where(mask, 0, -1).int(),
        finish_reason="stop" if stopped else "length",
    )


def group(prompt: Prompt, responses: list[str], tokenizer: Tokenizer, *, stop: bool = True) -> Group:
    encode = tokenizer.encode_answer if stop else lambda text: tokenizer.encode_answer(text)[:-1]
    return Group(prompt, [rollout(prompt, encode(text), tokenizer) for text in responses])


def rewards(groups: list[Group]) -> list[float | None]:
    return [r.reward for g in groups for r in g.rollouts]


def config(**settings: Any) -> TaskConfig:
    return TaskConfig(name="jsonl", **settings)


def test_rewards_are_filled_in_and_nothing_else_changes(tokenizer: Tokenizer) -> None:
    task = FunctionTask(len)
    first, second = task.prompts("train", 0, 2)
    groups = [group(first, ["a", "abc"], tokenizer), group(second, [" ", ""], tokenizer)]
    with Scorer(task, config(), tokenizer) as scorer:
        scored, report = scorer.score(groups)
    assert rewards(scored) == [1.0, 3.0, 1.0, 0.0]
    assert rewards(groups) == [None] * 4
    assert [g.prompt.id for g in scored] == [0, 1]
    assert scored[0].rollouts[1].token_ids is groups[0].rollouts[1].token_ids
    assert report == ScoreReport(num_scored=4)


def test_the_text_is_the_response_without_its_stop_token(tokenizer: Tokenizer) -> None:
    recorder = Recorder()
    task = FunctionTask(recorder)
    (prompt,) = task.prompts("train", 0, 1)
    with Scorer(task, config(), tokenizer) as scorer:
        scorer.score([group(prompt, [" ab ", ""], tokenizer), group(prompt, ["cut of"], tokenizer, stop=False)])
        two_turns = rollout(prompt, tokenizer.encode_answer("xyz"), tokenizer)
        two_turns.response_mask[3] = False  # a token that is not the policy's
        scorer.score([Group(prompt, [two_turns])])
    assert recorder.seen == [" ab ", "", "cut of", "xz"]


def test_a_stop_token_that_is_no_special_token_is_dropped(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = tokenizer.encode_prompt(".")[0]
    monkeypatch.setattr(tokenizer, "stop_token_ids", (1, dot))
    recorder = Recorder()
    task = FunctionTask(recorder)
    (prompt,) = task.prompts("train", 0, 1)
    Scorer(task, config(), tokenizer).score([group(prompt, ["a.b.", "."], tokenizer, stop=False)])
    assert recorder.seen == ["a.b", ""]


def test_threshold(tokenizer: Tokenizer) -> None:
    task = FunctionTask({"a": 0.4, "b": 0.5, "c": 1.0, "d": math.nan}.__getitem__)
    (prompt,) = task.prompts("train", 0, 1)
    scored, report = Scorer(task, config(reward_threshold=0.5), tokenizer).score(
        [group(prompt, list("abcd"), tokenizer)]
    )
    assert rewards(scored) == [0.0, 1.0, 1.0, None]
    assert (report.num_scored, report.num_failed, report.num_timed_out) == (3, 1, 0)


def test_a_task_whose_score_fails_is_counted(tokenizer: Tokenizer) -> None:
    task = FunctionTask(lambda text: {"ok": 1.0, "nan": math.nan, "none": None}[text])
    (prompt,) = task.prompts("train", 0, 1)
    responses = ["ok", "boom", "nan", "none"]
    scored, report = Scorer(task, config(), tokenizer).score([group(prompt, responses, tokenizer)])
    assert rewards(scored) == [1.0, None, None, None]
    assert report == ScoreReport(num_scored=1, num_failed=3, first_error="KeyError: 'boom'")


def test_own_reward_with_failures_and_timeouts(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "import time\n"
        "def score(text, reference):\n"
        "    if text == 'hang': time.sleep(60)\n"
        "    return {'yes': 1, 'nan': float('nan'), 'ref': len(reference['answer'])}[text]\n"
    )
    monkeypatch.chdir(tmp_path)
    task = FunctionTask(lambda text: pytest.fail("the task's own score was used"))
    (prompt,) = task.prompts("train", 0, 1)
    settings = config(reward="own:score", reward_timeout_s=1.0, reward_workers=2, reward_threshold=0.5)
    with Scorer(task, settings, tokenizer) as scorer:
        groups = [group(prompt, ["yes", "hang", "nan"], tokenizer), group(prompt, ["boom", "ref"], tokenizer)]
        scored, report = scorer.score(groups)
        again, second = scorer.score([group(prompt, ["yes", "yes"], tokenizer)])
    assert rewards(scored) == [1.0, None, None, None, 1.0]
    assert (report.num_scored, report.num_failed, report.num_timed_out) == (2, 2, 1)
    assert report.first_error == "scoring took longer than 1 s"
    assert rewards(again) == [1.0, 1.0] and second == ScoreReport(num_scored=2)


def test_a_bad_own_reward_is_refused_at_the_start(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"task.reward='nowhere:score': cannot import module \"nowhere\""):
        Scorer(FunctionTask(len), config(reward="nowhere:score"), tokenizer)


def jsonl(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Task, TaskConfig]:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "half?", "answer": "1/2"}\n{"prompt": "capital?", "answer": "Paris"}\n')
    settings = TaskConfig(name="jsonl", dataset=str(path), holdout=0, reward_timeout_s=5.0)
    return build(settings, tokenizer, seed=0), settings


def test_math_verify_cannot_hang_the_trainer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, settings = jsonl(tmp_path, tokenizer)
    half, capital = sorted(task.prompts("train", 0, 2), key=lambda p: p.text, reverse=True)
    groups = [
        group(half, ["0.5", "1/3", "9^{9^{9^9}}", "so \\boxed{2/4}"], tokenizer),
        group(capital, ["Paris", "Rome"], tokenizer),
    ]
    with Scorer(task, settings, tokenizer) as scorer:
        scored, report = scorer.score(groups)
    assert rewards(scored) == [1.0, 0.0, None, 1.0, 1.0, 0.0]
    assert (report.num_scored, report.num_failed, report.num_timed_out) == (5, 0, 1)


def test_a_data_set_that_evaluates_the_response_runs_in_a_worker(tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = TaskConfig(
        name="reasoning_gym",
        dataset="number_sorting",
        prompt_pattern=r"(?P<line>[^\n]+)",
        prompt_template="{line}",
        reward_timeout_s=10.0,
    )
    task = build(settings, tokenizer, seed=0)
    (prompt,) = task.prompts("train", 0, 1)
    with Scorer(task, settings, tokenizer) as scorer:
        scored, _ = scorer.score([group(prompt, [task.answer(prompt), "nonsense"], tokenizer)])
    assert rewards(scored) == [1.0, task.score(prompt, "nonsense")] and rewards(scored)[1] != 1.0
