"""VESPO, Variational Sequence-level Soft Policy Optimization (arXiv 2602.10693, equation 20)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Aggregation, Algorithm
from gspo_megatron.algorithms.tokens import PolicyTokens, token_loss
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class VESPO(Algorithm):
    """-(1/N) Σ_i sg[φ(W_i)] A_i Σ_t log π(y_it) with φ(W) = W^c1 · e^(c2 (1 - W)), W_i = Π_t r_it not normalised.

    (c1, c2) = (2, 3) for A > 0 and (3, 2) for A < 0 are the paper's (section 4.1), and so is A = r - mean, without
    the division by the standard deviation. Equation 20 is an expectation over responses, hence the sum over tokens;
    the paper's code and TRL divide by the tokens of the batch. log φ is taken from log W, so that nothing overflows:
    φ is 0 for W beyond all bounds. Nothing is clipped, and nothing counts as clipped.
    """

    name: ClassVar[str] = "vespo"
    level: ClassVar[Level] = "sequence"
    aggregation: ClassVar[Aggregation] = "token_sum"

    normalize_std: bool = False
    vespo_c1_positive: float = 2.0
    vespo_c2_positive: float = 3.0
    vespo_c1_negative: float = 3.0
    vespo_c2_negative: float = 2.0

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
        log_weight = tokens.responses.spread(tokens.responses.sums(tokens.log_ratio)[0])
        c1 = tokens.by_sign(self.vespo_c1_positive, self.vespo_c1_negative)
        c2 = tokens.by_sign(self.vespo_c2_positive, self.vespo_c2_negative)
        factor = (c1 * log_weight - c2 * log_weight.expm1()).exp() * tokens.advantages
        return token_loss(
            logprobs, tokens, value=factor * tokens.logprobs, slope=factor, divisor=num_sequences, weights=weights
        )
