"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import ClippedAlgorithm
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class GSPO(ClippedAlgorithm):
    """One length-normalised importance ratio per response: clipped, weighted and averaged as a whole.

    Defaults are the paper's: clip 3e-4 / 4e-4 and four mini-batches per rollout batch (section 5.1), no KL.
    """

    name: ClassVar[str] = "gspo"
    level: ClassVar[Level] = "sequence"
    usual_clip_below: ClassVar[float | None] = 0.05

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def loss(
        self,
        logprobs: Tensor,
        batch: MicroBatch,
        *,
        num_sequences: int,
        num_tokens: int | None = None,
        weights: Tensor | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, PolicyLossStats]:
        self.check_one_advantage_each(batch)
        return self.clipped_loss(
            logprobs, batch, batch.advantages, num_sequences=num_sequences, weights=weights, cp_group=cp_group
        )
