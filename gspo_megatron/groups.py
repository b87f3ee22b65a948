"""The torch process groups of a layout. Built by policy/runtime, passed down to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from gspo_megatron.parallel import Coordinates, ParallelLayout

Group = dist.ProcessGroup


@dataclass(frozen=True)
class ProcessGroups:
    """One group per axis, this rank's own, and where the rank sits."""

    layout: ParallelLayout
    rank: int
    tp: Group  # tensor parallel
    cp: Group  # context parallel
    pp: Group  # pipeline parallel
    dp: Group  # data parallel
    dp_cp: Group  # data and context parallel: the ranks whose dense gradients are summed
    ep: Group  # expert parallel
    etp: Group  # expert tensor parallel
    edp: Group  # expert data parallel
    replica: Group  # all ranks of this data-parallel replica; its first member is the head
    world: Group

    @property
    def coordinates(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def head_rank(self) -> int:
        """Global rank of this replica's head."""
        return self.layout.head_rank(self.coordinates.data)

    @property
    def is_head(self) -> bool:
        """Whether this rank drives the rollouts of its replica."""
        return self.rank == self.head_rank

    @property
    def sequence_group(self) -> Group | None:
        """The ranks that share each sequence's tokens; None where a rank holds whole sequences."""
        return self.cp if self.layout.context > 1 else None

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pipeline == self.layout.pipeline - 1

    @property
    def reports_loss(self) -> bool:
        """One rank of each data-parallel replica's last pipeline stage: it holds the step's statistics."""
        c = self.coordinates
        return self.is_last_stage and c.tensor == 0 and c.context == 0
