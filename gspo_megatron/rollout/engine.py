"""What every rollout engine offers, whether it runs in process or behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gspo_megatron.types import Group, Prompt
from gspo_megatron.weights.gather import GatheredBucket


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn."""

    num_samples: int  # responses per prompt
    temperature: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int  # of this call; the same call with the same weights gives the same responses


class RolloutEngine(Protocol):
    """Generation between weight updates. `generate` refuses to run inside an update."""

    name: str  # for logs and metrics, e.g. "embedded, not SGLang"

    @property
    def version(self) -> int: ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]: ...

    def pause(self) -> None: ...

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: GatheredBucket) -> None: ...

    def end_update(self) -> None: ...

    def resume(self) -> None: ...
