"""The parallel layout: degrees and rank arithmetic, without any process group.

Ranks are ordered as Megatron-Core orders them: tensor fastest, then context, then data, then pipeline.
Expert layers share the same ranks under a second grid: expert-tensor fastest, then expert, then
expert-data, then pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.errors import UserError


@dataclass(frozen=True)
class Coordinates:
    """Where one rank sits in the dense grid and in the expert grid."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of parallelism. `data` replicates tensor × context × pipeline."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual_pipeline: int = 1

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            degree = getattr(self, name)
            if degree < 1:
                raise UserError(f"parallel.{name}={degree} must be at least 1")
        per_stage = self.tensor * self.context * self.data
        if per_stage % (self.expert * self.expert_tensor):
            name, taken = (
                ("expert", self.expert_tensor) if per_stage % self.expert_tensor == 0 else ("expert_tensor", 1)
            )
            raise UserError(
                f"parallel.expert={self.expert} × parallel.expert_tensor={self.expert_tensor} must divide "
                f"tensor×context×data={per_stage}, the ranks of one pipeline stage; use {name} in "
                f"{[d for d in range(1, per_stage + 1) if per_stage % (d * taken) == 0]}"
            )

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_data(self) -> int:
        return self.tensor * self.context * self.data // (self.expert * self.expert_tensor)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank in both grids."""
        stage_size = self.tensor * self.context * self.data
        pipeline, within = divmod(rank, stage_size)
        return Coordinates(
            tensor=within % self.tensor,
            context=within // self.tensor % self.context,
            data=within // (self.tensor * self.context),
            pipeline=pipeline,
            expert_tensor=within % self.expert_tensor,
            expert=within // self.expert_tensor % self.expert,
            expert_data=within // (self.expert_tensor * self.expert),
        )

    def rank(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at a place of the dense grid."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def expert_rank(self, *, expert: int, expert_tensor: int = 0, expert_data: int = 0, pipeline: int = 0) -> int:
        """The rank at a place of the expert grid."""
        within = expert_tensor + self.expert_tensor * (expert + self.expert * expert_data)
        return within + self.tensor * self.context * self.data * pipeline

    def head_rank(self, data: int) -> int:
        """The rank that drives the rollouts of one data-parallel replica."""
        return self.rank(data=data)

    def replica_ranks(self, data: int) -> list[int]:
        """All ranks that hold one data-parallel replica of the model."""
        return [r for r in range(self.world_size) if self.coordinates(r).data == data]

    def describe(self) -> str:
        """'TP2 × PP1 × …, 4 ranks', naming the degrees above 1."""
        short = {
            "tensor": "TP",
            "pipeline": "PP",
            "virtual_pipeline": "VPP",
            "context": "CP",
            "data": "DP",
            "expert": "EP",
            "expert_tensor": "ETP",
        }
        parts = [f"{tag}{getattr(self, name)}" for name, tag in short.items() if getattr(self, name) > 1]
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        return f"{' × '.join(parts) or 'no parallelism'}, {ranks}"
