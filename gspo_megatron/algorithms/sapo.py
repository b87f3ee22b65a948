"""SAPO, Soft Adaptive Policy Optimization (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.tokens import PolicyTokens, token_loss
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch

# Here the gate's derivative has long been 0, and the ratio is finite in float64.
_LARGEST_LOG_RATIO = 100.0


@dataclass(frozen=True)
class SAPO(Algorithm):
    """-(1/N) Σ_i (1/T_i) Σ_t f(r_it) A_i with the soft gate f(r) = (4/τ) σ(τ (r - 1)), τ by the sign of A_i.

    The gradient of a token is weighted by 4 σ(1 - σ) r: 1 at r = 1, falling off smoothly on both sides, faster for
    the larger τ of A < 0. Temperatures 1.0 and 1.05 are the paper's. Nothing is ever clipped, and nothing counts as
    clipped.
    """

    name: ClassVar[str] = "sapo"
    level: ClassVar[Level] = "token"

    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05

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
        responses, advantages = tokens.responses, tokens.advantages
        tau = tokens.by_sign(self.sapo_tau_positive, self.sapo_tau_negative)
        log_ratio = tokens.log_ratio.clamp(max=_LARGEST_LOG_RATIO)
        gate, rest = (tau * log_ratio.expm1()).sigmoid(), (-tau * log_ratio.expm1()).sigmoid()
        return token_loss(
            logprobs,
            tokens,
            value=4 / tau * gate * advantages,
            slope=4 * gate * rest * log_ratio.exp() * advantages,
            divisor=responses.spread(responses.lengths) * num_sequences,
            weights=weights,
        )
