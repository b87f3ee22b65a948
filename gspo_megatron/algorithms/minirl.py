"""MiniRL (arXiv 2512.01374, equation 7): REINFORCE with importance weights and a mask for stale tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Aggregation, Algorithm
from gspo_megatron.algorithms.mismatch import Mismatch
from gspo_megatron.algorithms.tokens import PolicyTokens, token_loss
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class MiniRL(Algorithm):
    """-(1/N) Σ_i Σ_t M_it sg[π(y_it) / μ(y_it)] A_i log π(y_it): no length normalisation, A = r - mean.

    M_it is 0 where A > 0 and r_it > 1 + clip_high, or A < 0 and r_it < 1 - clip_low, else 1. The weight is taken as
    r_it times the mismatch weight π_old / μ, which is on by default here and truncated at 5. Clip, truncation and
    advantage are the paper's (sections 4.1 and 4.2); whether it truncates π_old / μ or π / μ it does not say. Masked
    tokens count as clipped.
    """

    name: ClassVar[str] = "minirl"
    level: ClassVar[Level] = "token"
    aggregation: ClassVar[Aggregation] = "token_sum"
    default_mismatch: ClassVar[Mismatch] = Mismatch("truncate", high=5.0)

    normalize_std: bool = False
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
        tokens = PolicyTokens.of(logprobs, batch, cp_group)
        log_ratio, advantages = tokens.log_ratio, tokens.advantages
        clipped = (advantages > 0) & (log_ratio > log1p(self.clip_high))
        clipped |= (advantages < 0) & (log_ratio < log1p(-self.clip_low))
        factor = (log_ratio.exp() * advantages).masked_fill(clipped, 0.0)
        return token_loss(
            logprobs,
            tokens,
            value=factor * tokens.logprobs,
            slope=factor,
            divisor=num_sequences,
            weights=weights,
            clipped=clipped,
        )
