"""What every rollout engine offers, whether it runs in process or behind a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gspo_megatron.types import Group, Prompt
from gspo_megatron.weights.gather import GatheredBucket
from gspo_megatron.weights.reshard import ReshardPlan


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn."""

    num_samples: int  # responses per prompt
    temperature: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int  # of this call; the same call with the same weights gives the same responses
    routes: bool = False  # return Rollout.routes


@dataclass(frozen=True)
class Feeding:
    """How an engine wants the weights; see `plan_reshard`. Alike on all ranks."""

    feeds: list[list[int]]  # ranks that may send, one list for each set of engines reached together
    dtype: torch.dtype | None = None  # None: that of the policy
    bucket_bytes: int = 256 * 2**20


Export = Callable[[ReshardPlan], Iterator[GatheredBucket]]
"""Carries out a plan over the policy's weights, collectively."""


class RolloutEngine(Protocol):
    """Generation between weight updates.

    `generate` refuses to run inside an update. An update is pause, begin_update, update for every bucket, end_update,
    resume; if end_update says False, it is made again from the start.
    """

    @property
    def name(self) -> str:
        """For logs and metrics, e.g. "embedded, not SGLang"."""
        ...

    @property
    def version(self) -> int: ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Sequence[Group | None]:
        """Groups in the prompts' order; None where the engine was lost on the way."""
        ...

    def pause(self) -> None: ...

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: GatheredBucket) -> None: ...

    def end_update(self, export: Export) -> bool: ...

    def resume(self) -> None: ...

    def rest(self) -> None:
        """The trainer takes over until the next `pause`: give it the memory that it shares with the engine."""
        ...

    def close(self) -> None: ...
