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
