"""Rewards of rollouts: the task's score or the user's own function, counted, never guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from gspo_megatron.config import TaskConfig
from gspo_megatron.tasks.base import Task
from gspo_megatron.tasks.worker_pool import Outcome, WorkerPool
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport


class Scorer:
    """Fills in the rewards of rollouts.

    The user's own function (task.reward), and a task's score that may hang or that evaluates the response,
    run in worker processes which are killed at task.reward_timeout_s. Other scores run in this process.
    """

    def __init__(self, task: Task, config: TaskConfig, tokenizer: Tokenizer) -> None:
        """Raises UserError if task.reward names no usable function."""
        self._task = task
        self._tokenizer = tokenizer
        self._threshold = config.reward_threshold
        self._pool: WorkerPool | None = None
        if config.reward:
            self._pool = WorkerPool(config.reward, num_workers=config.reward_workers, timeout_s=config.reward_timeout_s)
        elif task.isolated is not None:
            self._pool = WorkerPool(
                task.isolated.target,
                arguments=task.isolated.arguments,
                num_workers=config.reward_workers,
                timeout_s=config.reward_timeout_s,
                setting=f"score of task {task.name}",
            )

    def score(self, groups: list[Group]) -> tuple[list[Group], ScoreReport]:
        """The groups with Rollout.reward filled in, and how the rewards came about.

        A reward is None where the scorer raised, returned no finite number or took too long; the report
        counts these and keeps the reason of the first one in order.
        """
        items = [(group.prompt, self._response_text(rollout)) for group in groups for rollout in group.rollouts]
        if self._pool is None:
            outcomes = [self._score_here(prompt, text) for prompt, text in items]
        else:
            outcomes = self._pool.map([(text, prompt.reference) for prompt, text in items])
        rewards = iter([self._reward(outcome) for outcome in outcomes])
        scored = [
            replace(group, rollouts=[replace(rollout, reward=next(rewards)) for rollout in group.rollouts])
            for group in groups
        ]
        return scored, _report(outcomes)

    def close(self) -> None:
        """End the worker processes, if any."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _response_text(self, rollout: Rollout) -> str:
        ids = rollout.token_ids[rollout.response_mask].tolist()
        # A stop token need not be a special one that decode skips.
        if ids and ids[-1] in self._tokenizer.stop_token_ids:
            ids.pop()
        return self._tokenizer.decode(ids)

    def _score_here(self, prompt: Prompt, response_text: str) -> Outcome:
        try:
            value = float(self._task.score(prompt, response_text))
        except Exception as error:  # a scorer's failure on one response is counted, it does not end the run
            return Outcome(None, f"{type(error).__name__}: {error}")
        return Outcome(value) if math.isfinite(value) else Outcome(None, f"the score is {value}, no finite number")

    def _reward(self, outcome: Outcome) -> float | None:
        if outcome.value is None or self._threshold is None:
            return outcome.value
        return float(outcome.value >= self._threshold)


def _report(outcomes: Sequence[Outcome]) -> ScoreReport:
    reasons = [outcome.reason for outcome in outcomes if outcome.value is None]
    timed_out = sum(outcome.timed_out for outcome in outcomes)
    return ScoreReport(
        num_scored=len(outcomes) - len(reasons),
        num_failed=len(reasons) - timed_out,
        num_timed_out=timed_out,
        first_error=reasons[0] if reasons else None,
    )
