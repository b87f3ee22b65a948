"""CISPO, clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585, equations 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Aggregation, Algorithm
from gspo_megatron.algorithms.tokens import PolicyTokens, token_loss
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class CISPO(Algorithm):
    """-(1/Σ_i T_i) Σ_i Σ_t sg[min(r_it, 1 + clip_high)] A_i log π(y_it): every token keeps its gradient.

    The weight has no lower bound, as in the paper's experiments. The paper does not give its clip_high; 4 is the
    ε_max = 5 of ScaleRL (arXiv 2510.13786), which bounds the weight itself. Equation 4 divides by the tokens of a
    group; here they are those of the global batch, as public implementations have it. A token counts as clipped
    where its weight is at the bound.
    """

    name: ClassVar[str] = "cispo"
    level: ClassVar[Level] = "token"
    aggregation: ClassVar[Aggregation] = "token_mean"

    clip_high: float = 4.0

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
        assert num_tokens is not None, "cispo divides by the response tokens of the global batch"
        tokens = PolicyTokens.of(logprobs, batch, cp_group)
        factor = tokens.log_ratio.exp().clamp(max=1 + self.clip_high) * tokens.advantages
        return token_loss(
            logprobs,
            tokens,
            value=factor * tokens.logprobs,
            slope=factor,
            divisor=max(num_tokens, 1),
            weights=weights,
            clipped=(tokens.log_ratio > log1p(self.clip_high)) & (tokens.advantages != 0),
        )
