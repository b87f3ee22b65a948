"""Weights for the difference between the engine that sampled and the trainer: TIS, MIS, Geo-RS, OPSM."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from types import MappingProxyType
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.tokens import Responses
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.errors import UserError
from gspo_megatron.types import MicroBatch

Mode = Literal["off", "truncate", "mask", "geometric"]

# low and high where they are not set: the usual values.
BANDS: Final = MappingProxyType[str, tuple[float, float]](
    {"off": (0.5, 2.0), "truncate": (0.5, 2.0), "mask": (0.5, 2.0), "geometric": (0.999, 1.001)}
)


@dataclass(frozen=True)
class Mismatch:
    """ω_t from ρ_t = π_old(y_t) / μ(y_t), μ the rollout engine's probability.

    "off": 1. "truncate" (TIS): min(ρ, high). "mask" (MIS): ρ where low ≤ ρ ≤ high, else 0. "geometric" (Geo-RS): 1
    for all tokens of a response whose geometric mean of ρ lies in low … high, else 0; it rejects, and does not weigh.
    The weight is apart from the policy ratio: π_old is the trainer's own recompute in every mode.

    OPSM (DeepSeek-V3.2, arXiv 2512.02556, equations 8 and 9), on top of any mode: 0 for tokens with A < 0 of a
    response whose mean of log(μ / π) is above opsm_delta, π being the policy as it is trained. The report's π_old is
    the engine's probability, so that the mean holds both mismatch and staleness; it gives no delta, TRL suggests 0.5.
    """

    mode: Mode = "off"
    low: float = 0.5
    high: float = 2.0
    opsm_delta: float | None = None

    def __post_init__(self) -> None:
        if self.low >= self.high and self.mode in ("mask", "geometric"):
            raise UserError(
                f"algorithm.mismatch_low={self.low:g} must be below mismatch_high={self.high:g}; "
                f'usual for mismatch="{self.mode}": {BANDS[self.mode][0]:g} and {BANDS[self.mode][1]:g}'
            )

    @classmethod
    def from_config(cls, config: AlgorithmConfig, default: Mismatch | None = None) -> Mismatch:
        """The config's; where it does not name a mode, that of `default`, the algorithm's own."""
        default = default or cls()
        mode = default.mode if config.mismatch is None else config.mismatch
        low, high = (default.low, default.high) if mode == default.mode else BANDS[mode]
        return cls(
            mode,
            low if config.mismatch_low is None else config.mismatch_low,
            high if config.mismatch_high is None else config.mismatch_high,
            config.opsm_delta,
        )

    @property
    def is_off(self) -> bool:
        return self.mode == "off" and self.opsm_delta is None

    def weights(
        self, batch: MicroBatch, logprobs: Tensor | None = None, cp_group: dist.ProcessGroup | None = None
    ) -> Tensor | None:
        """[T] of the dtype of the log-probabilities, detached, target-aligned like the batch; 0 outside the response.
        None when off.

        NaN is outside no band: it stays, and shows in the loss.

        Args:
            logprobs: [T] of the policy being trained, for opsm_delta.
            cp_group: context-parallel group, if the batch is this rank's share of its tokens.
        """
        if self.is_off:
            return None
        assert batch.old_logprobs is not None, "the old log-prob pass comes before the mismatch weights"
        weights = torch.ones_like(batch.rollout_logprobs, dtype=torch.float64)
        if self.mode in ("truncate", "mask"):
            weights = (batch.old_logprobs.detach() - batch.rollout_logprobs).exp()
        if self.mode == "truncate":
            weights = weights.clamp(max=self.high)
        if self.mode == "mask":
            weights = weights.masked_fill((weights < self.low) | (weights > self.high), 0.0)
        if self.mode == "geometric" or self.opsm_delta is not None:
            weights = weights * self._kept(batch, logprobs, cp_group)
        # Under the mask the ratio may be NaN.
        return torch.where(batch.response_mask, weights, 0.0).to(batch.rollout_logprobs.dtype)

    def _kept(self, batch: MicroBatch, logprobs: Tensor | None, cp_group: dist.ProcessGroup | None) -> Tensor:
        """[T] float64: 1 for tokens of responses that are kept, 0 for others."""
        responses = Responses.of(batch, cp_group)
        rollout = responses.select(batch.rollout_logprobs)
        kept = torch.ones_like(rollout)
        if self.mode == "geometric":
            assert batch.old_logprobs is not None
            mean = responses.spread(responses.mean(responses.select(batch.old_logprobs) - rollout))
            is_out = (mean < (log(self.low) if self.low > 0 else -inf)) | (mean > log(self.high))
            kept = torch.where(mean.isnan(), mean, kept.masked_fill(is_out, 0.0))
        if self.opsm_delta is not None:
            assert logprobs is not None, "opsm_delta compares with the policy being trained"
            mean = responses.spread(responses.mean(rollout - responses.select(logprobs)))
            is_out = (responses.advantages(batch) < 0) & (mean > self.opsm_delta)
            kept = torch.where(mean.isnan(), mean, kept.masked_fill(is_out, 0.0))
        return kept
