"""Weights for the difference between the engine that sampled and the trainer that computes old log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class Mismatch:
    """ω_t from ρ_t = π_old(y_t) / μ(y_t), μ the rollout engine's probability.

    "off": no weights. "truncate" (TIS): min(ρ, high). "mask" (MIS): ρ where low ≤ ρ ≤ high, else 0.
    The weight is apart from the policy ratio: π_old is the trainer's own recompute in every mode.
    """

    mode: Literal["off", "truncate", "mask"] = "off"
    low: float = 0.5
    high: float = 2.0

    @classmethod
    def from_config(cls, config: AlgorithmConfig) -> Mismatch:
        return cls(config.mismatch, config.mismatch_low, config.mismatch_high)

    def weights(self, batch: MicroBatch) -> Tensor | None:
        """[T] float32, detached, target-aligned like the batch; 0 outside the response. None when off."""
        if self.mode == "off":
            return None
        assert batch.old_logprobs is not None, "the old log-prob pass comes before the mismatch weights"
        ratio = (batch.old_logprobs.detach() - batch.rollout_logprobs).exp()
        if self.mode == "truncate":
            weights = ratio.clamp(max=self.high)
        else:
            # NaN is outside no band: it stays, and shows in the loss.
            weights = ratio.masked_fill((ratio < self.low) | (ratio > self.high), 0.0)
        return torch.where(batch.response_mask, weights, 0.0).float()  # under the mask the ratio may be NaN
