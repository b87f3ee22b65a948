"""LUSPO, Length-Unbiased Sequence Policy Optimization (arXiv 2602.05261)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Aggregation
from gspo_megatron.algorithms.gspo import GSPO
from gspo_megatron.algorithms.tokens import Responses
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class LUSPO(GSPO):
    """-(1/N) Σ_i T_i · min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i): each response's GSPO term, T_i times.

    A token's gradient then no longer depends on how long its response is. Clip 2e-3 / 2.5e-3 is the paper's
    (section 5.1). Ratio, clip and what counts as clipped are GSPO's.
    """

    name: ClassVar[str] = "luspo"
    aggregation: ClassVar[Aggregation] = "token_sum"

    clip_low: float = 2e-3
    clip_high: float = 2.5e-3

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
        responses = Responses.of(batch, cp_group)
        lengths = responses.spread(responses.num_tokens)
        weights = lengths if weights is None else lengths * weights  # weights scale a term, and nothing else
        return super().loss(logprobs, batch, num_sequences=num_sequences, weights=weights, cp_group=cp_group)
