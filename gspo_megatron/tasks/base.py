"""What a task is. Imports nothing heavy: reward workers load this package without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from gspo_megatron.types import Prompt

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class IsolatedReward:
    """A score that may hang, or evaluates what the model wrote: it runs in a worker that can be killed."""

    target: str  # "module:function", called as function(response_text, reference, **arguments)
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Prompts with a verifiable reward.

    `isolated` is None for a score that is harmless in the training process; otherwise the Scorer runs
    it in worker processes, and `score` is the same function without that protection.
    """

    name: str
    isolated: IsolatedReward | None

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """Prompts at positions start … start + count - 1 of the split's order.

        A pure function of (seed, split, start, count): equal on every rank and after a resume.
        Prompt.id is the position. The train order is endless. A finite held-out split returns
        fewer prompts, or none, past its end. No held-out prompt's text is ever a training prompt's.
        """
        ...

    def answer(self, prompt: Prompt) -> str:
        """The worked answer, for the supervised cold start."""
        ...

    def score(self, prompt: Prompt, response_text: str) -> float:
        """The score of a response, before task.reward_threshold."""
        ...


@runtime_checkable
class FiniteTask(Protocol):
    """A task whose prompts can all be looked at before a run starts, because there are only so many."""

    def rows(self, split: Split) -> Iterator[tuple[str, Prompt]]:
        """Every prompt of the split once, with the place a message names, e.g. "train.jsonl:12".

        Raises:
            UserError: a prompt the tokenizer cannot encode, with its place.
        """
        ...
