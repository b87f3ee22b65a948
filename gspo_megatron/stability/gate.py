"""What train/rollout mismatch does to the clip, and how much of it a clip bears.

Sampled tokens come from the engine's policy μ. If the engine's log-probabilities stand for π_old, then even before any
update log s is not 0: its expectation under μ is -KL(μ ‖ π), per token. Mismatch that comes of rounding is many small
independent differences of the tokens, for which a token's log ratio has variance 2·KL. Over the T tokens of a response

    log s ~ Normal(-KL, 2·KL / T)

so that with a clip [1 - ε_low, 1 + ε_high] the responses with a negative advantage are clipped first, by

    P(log s < log(1 - ε_low)) = Φ((log(1 - ε_low) + KL) / √(2·KL / T))

At T = 4096 and the paper's ε_low = 3e-4 that is 1 % at KL = 3e-5, 19 % at 1e-4, 51 % at 3e-4 and 92 % at 1.5e-3, while
hardly any with a positive advantage are: learning from good responses alone, without a message.
"""

from __future__ import annotations

import math
from statistics import NormalDist

# Of the negative responses, what mismatch alone may clip: an eighth of what the updates usually do.
BEARABLE_SHARE = 0.05


def clipped_by_mismatch(kl: float, *, clip_low: float, clip_high: float, tokens: float) -> tuple[float, float]:
    """Shares of the responses with a positive and with a negative advantage that mismatch alone clips, by the model.

    Args:
        kl: KL(μ ‖ π) per token, in nats, 0 or more.
        tokens: T, response tokens that a ratio is the mean of; 1 for token ratios.
    """
    low, high = math.log1p(-clip_low), math.log1p(clip_high)
    if kl <= 0:
        return 0.0, 0.0
    log_s = NormalDist(-kl, math.sqrt(2 * kl / tokens))
    return 1 - log_s.cdf(high), log_s.cdf(low)


def largest_kl(clip_low: float, tokens: float, share: float = BEARABLE_SHARE) -> float:
    """The KL per token at which mismatch alone clips `share` of the responses with a negative advantage.

    With z the normal quantile of 1 - share, KL + z·√(2/T)·√KL = -log(1 - ε_low) is quadratic in √KL. At T = 4096 and
    ε_low = 3e-4 it is 4.8e-5; for T → ∞ it tends to -log(1 - ε_low), and short responses bear less, because their log s
    is noisier.
    """
    half = NormalDist().inv_cdf(1 - share) * math.sqrt(2 / tokens) / 2
    return (math.sqrt(half * half - math.log1p(-clip_low)) - half) ** 2
