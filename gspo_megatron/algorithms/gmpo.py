"""GMPO, Geometric-Mean Policy Optimization (arXiv 2507.20673)."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log1p
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.tokens import PolicyTokens, token_loss
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class GMPO(Algorithm):
    """-(1/N) Σ_i A_i · (Π_t c_it)^(1/T_i): GSPO's ratio, of token ratios that are clipped before their mean is taken.

    c_it = min(r_it, 1 + clip_high) for A_i > 0, max(r_it, 1 - clip_low) for A_i < 0: what min(r A, clip(r) A) comes
    to. A clipped token has no gradient; the others of its response keep theirs. The clip is the paper's, which writes
    its bounds as e^-0.4 and e^0.4.
    """

    name: ClassVar[str] = "gmpo"
    level: ClassVar[Level] = "token"

    clip_low: float = 1 - exp(-0.4)
    clip_high: float = exp(0.4) - 1

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
        tokens = PolicyTokens.of(logprobs, batch, cp_group)
        log_ratio, responses, is_positive = tokens.log_ratio, tokens.responses, tokens.advantages > 0
        low, high = log1p(-self.clip_low), log1p(self.clip_high)
        bounded = torch.where(is_positive, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
        mean_ratio = responses.spread(responses.mean(bounded)).exp()
        clipped = (bounded != log_ratio) & (tokens.advantages != 0)
        value = mean_ratio * tokens.advantages
        return token_loss(
            logprobs,
            tokens,
            value=value,
            slope=value.masked_fill(clipped, 0.0),
            divisor=responses.spread(responses.lengths) * num_sequences,
            weights=weights,
            clipped=clipped,
        )
