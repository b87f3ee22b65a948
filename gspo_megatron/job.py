"""What every run of ranks starts from: groups, tokenizer, task, and the engine on the heads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.device import DTYPES, current_device
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.runtime import initialize, shutdown
from gspo_megatron.rollout.embedded import EmbeddedEngine
from gspo_megatron.rollout.engine import Feeding, RolloutEngine
from gspo_megatron.rollout.sglang.engine import SGLangEngine
from gspo_megatron.rollout.sglang.opening import open_sglang
from gspo_megatron.tasks import build as build_task
from gspo_megatron.tasks.base import Task
from gspo_megatron.tasks.scoring import Scorer
from gspo_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """One rank's share of a run."""

    config: TrainConfig | SftConfig
    groups: ProcessGroups
    tokenizer: Tokenizer
    task: Task
    scorer: Scorer | None  # at the heads
    engine: RolloutEngine | None  # embedded: at the heads; over servers: on every rank
    device: torch.device

    @property
    def heads(self) -> list[int]:
        """The ranks that generate."""
        layout = self.groups.layout
        return [layout.head_rank(d) for d in range(layout.data)]

    @property
    def feeding(self) -> Feeding:
        """How the engines want the weights, on every rank."""
        if isinstance(self.engine, SGLangEngine):
            return self.engine.feeding
        return Feeding([[head] for head in self.heads])

    def rest(self) -> None:
        """The engine gives the trainer the memory that they share, until the next weight update. Collective."""
        if self.engine is not None:
            self.engine.rest()

    def share(self, count: int) -> range:
        """Which of `count` numbered things this replica takes."""
        return range(self.groups.coordinates.data, count, self.groups.layout.data)

    def gather(self, record: Any) -> list[Any] | None:
        """Every rank's record that is not None, at rank 0; None elsewhere. For small things."""
        records: list[Any] | None = [None] * self.groups.layout.world_size if self.groups.rank == 0 else None
        dist.gather_object(record, records, dst=0, group=self.groups.world)
        return None if records is None else [r for r in records if r is not None]

    def all_gather(self, record: Any) -> list[Any]:
        """Every rank's record that is not None, at every rank. For small things."""
        records: list[Any] = [None] * self.groups.layout.world_size
        dist.all_gather_object(records, record, group=self.groups.world)
        return [r for r in records if r is not None]


@contextlib.contextmanager
def open_job(config: TrainConfig | SftConfig) -> Iterator[Job]:
    """Join the ranks of the layout, and leave them after a clean end.

    After an error they are not left in order: other ranks may be blocked in a collective.
    """
    groups = initialize(config.parallel.layout(), seed=config.run.seed, timeout_s=config.parallel.timeout_s)
    with build_job(config, groups) as job:
        yield job
    shutdown()


@contextlib.contextmanager
def build_job(config: TrainConfig | SftConfig, groups: ProcessGroups) -> Iterator[Job]:
    """This rank's share of a run over groups that exist."""
    tokenizer = Tokenizer.load(config.model.path)
    task = build_task(config.task, tokenizer, seed=config.run.seed)
    with contextlib.ExitStack() as stack:
        engine: RolloutEngine | None = None
        if config.rollout.engine == "sglang":
            engine = stack.enter_context(open_sglang(config, groups, stop_token_ids=tokenizer.stop_token_ids))
        elif groups.is_head:
            engine = EmbeddedEngine(
                config.model.path,
                dtype=DTYPES[config.model.dtype],
                device=current_device(),
                batch_size=config.rollout.batch_size,
            )
        scorer = stack.enter_context(Scorer(task, config.task, tokenizer)) if groups.is_head else None
        job = Job(config, groups, tokenizer, task, scorer, engine, current_device())
        job.rest()  # the policy is built in the memory that servers give
        yield job
