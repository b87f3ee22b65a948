"""A closed-form model of what train/rollout mismatch does to GSPO's clip.

Tokens are drawn from the rollout distribution μ and weighed by the trainer's π. With d = log π − log μ of a token,

    E_μ[e^d] = 1    and    E_μ[d] = −KL(μ‖π) = −K.

If d is normal, the first equation fixes its variance: E[e^d] = exp(mean + var/2) = 1, so var = 2K. If a response's
tokens are independent, log s = (1/T) Σ d is normal with

    mean −K,   variance 2K/T.

The mean does not shrink with T, the spread does: long responses are clipped by their bias. For A < 0 a response is
clipped where log s < log(1 − ε_low), for A > 0 where log s > log(1 + ε_high).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAPER_CLIP = (3e-4, 4e-4)


@dataclass(frozen=True)
class ClipRates:
    """Shares of responses that are clipped, 0 to 1."""

    positive: float  # of those with A > 0
    negative: float  # of those with A < 0


def clip_rates(kl: float, length: float, *, clip_low: float, clip_high: float) -> ClipRates:
    """Clipped shares at a mismatch of `kl` nats a token and responses of `length` tokens."""
    return normal_clip_rates(-kl, 2 * kl / length, clip_low=clip_low, clip_high=clip_high)


def normal_clip_rates(mean: float, variance: float, *, clip_low: float, clip_high: float) -> ClipRates:
    """Clipped shares for log s ~ Normal(mean, variance)."""
    deviation = math.sqrt(variance)

    def below(bound: float) -> float:
        if deviation == 0:
            return float(mean < bound)
        return 0.5 * math.erfc((mean - bound) / (deviation * math.sqrt(2)))

    low, high = math.log1p(-clip_low), math.log1p(clip_high)
    return ClipRates(positive=1 - below(high), negative=below(low))
