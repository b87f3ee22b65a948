"""How far two policies are apart, estimated on tokens that one of them sampled.

With d = log q(y) - log p(y) at tokens y sampled from p (http://joschu.net/blog/kl-approx.html):

    k1 = -d              unbiased for KL(p ‖ q), noisy, may come out negative
    k3 = e^d - 1 - d     unbiased too, never negative, steadier while d is small

Rollouts are sampled from the engine's policy μ; π_old is the trainer's policy before the batch's updates, π_θ the one
that a mini-batch is computed with. Three distances are kept apart, per response token:

    mismatch   KL(μ ‖ π_old)     two programs that compute the same weights, or should
    staleness  KL(π_old ‖ π_θ)   the updates of this rollout batch; its samples are taken for π_old's, which they are
                                 but for the mismatch
    total      KL(μ ‖ π_θ)       both

k1 of the total is the sum of the other two; k3 is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DIVERGENCES = ("mismatch", "staleness", "total")
ESTIMATORS = ("k1", "k3")


def k1(log_ratio: Tensor) -> Tensor:
    """-d, elementwise, of log ratios d = log q - log p."""
    return -log_ratio


def k3(log_ratio: Tensor) -> Tensor:
    """e^d - 1 - d, elementwise, of log ratios d = log q - log p."""
    return torch.expm1(log_ratio) - log_ratio


def divergence_sums(logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Sums over the response tokens of k1 and k3 of mismatch, staleness and total, in float64.

    Args:
        logprobs, old_logprobs, rollout_logprobs: [T], of π_θ, π_old and μ; anything outside the response.
        response_mask: [T] bool.

    Returns:
        [3, 2], DIVERGENCES by ESTIMATORS. To be divided by the number of response tokens.
    """
    new, old, engine = (
        torch.where(response_mask, x.detach(), 0.0).double() for x in (logprobs, old_logprobs, rollout_logprobs)
    )
    gaps = torch.stack([old - engine, new - old, new - engine])  # exact: the differences of float32 fit float64
    return torch.stack([k1(gaps).sum(1), k3(gaps).sum(1)], dim=1)


def agreement_sums(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Sums over the response tokens of x, y, x², y² and xy, with x the trainer's and y the engine's log-probabilities.

    Returns:
        [5] float64, for `agreement`.
    """
    x, y = (torch.where(response_mask, v.detach(), 0.0).double() for v in (old_logprobs, rollout_logprobs))
    return torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def agreement(sums: Sequence[float], tokens: float) -> tuple[float | None, float | None]:
    """How the engine's log-probabilities follow the trainer's: correlation, and slope of the engine's by the trainer's.

    1 and 1 for one model. An engine that samples at another temperature keeps the correlation near 1, and its slope is
    about the ratio of the temperatures; other weights lose the correlation. None with fewer than two tokens, or where
    one of the two does not vary.
    """
    if tokens < 2:
        return None, None
    x, y, xx, yy, xy = (value / tokens for value in sums)
    var_x, var_y, covariance = xx - x * x, yy - y * y, xy - x * y
    if var_x <= 0 or var_y <= 0:
        return None, None
    return covariance / math.sqrt(var_x * var_y), covariance / var_x
