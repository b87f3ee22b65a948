"""GRPO, Group Relative Policy Optimization (arXiv 2402.03300), with the clip that the GSPO paper compares with."""

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
class GRPO(ClippedAlgorithm):
    """One importance ratio per token; token terms are averaged within a response, then over responses.

    Clip 0.2 / 0.27 and four mini-batches are the GRPO baseline of the GSPO paper (section 5.1). The k3 KL term
    of the GRPO paper is off; set kl_coefficient to have it.
    """

    name: ClassVar[str] = "grpo"
    level: ClassVar[Level] = "token"

    clip_low: float = 0.2
    clip_high: float = 0.27

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
        return self.clipped_loss(
            logprobs, batch, batch.advantages, num_sequences=num_sequences, weights=weights, cp_group=cp_group
        )
