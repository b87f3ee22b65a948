"""What every candidate is held to, in float64 and by autograd, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24
# A candidate whose errors are above these is wrong. Wide: they tell a mistake from rounding, not one rounding from
# another. Errors of outputs are absolute, of gradients relative to the norm of the whole gradient.
LIMITS = {
    torch.float32: {"output": 1e-4, "gradient": 1e-4},
    torch.bfloat16: {"output": 1e-1, "gradient": 3e-2},
}


def blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[r] and [r] of softmax(logits [r, V])."""
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def logits_gradient(
    logits: Tensor,  # [r, V] float64
    targets: Tensor,  # [r]
    grad_logprobs: Tensor,  # [r]
    grad_entropy: Tensor | None,  # [r]
) -> Tensor:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, targets)
    total = (logprobs * grad_logprobs.double()).sum()
    if grad_entropy is not None:
        total = total + (entropy * grad_entropy.double()).sum()
    return torch.autograd.grad(total, logits)[0]


def gspo_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    response_mask: Tensor,  # [T] bool
    lengths: list[int],  # S
    advantages: Tensor,  # [S]
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-1/S Σ min(s A, clip(s) A), log s the mean over the response of the tokens' log ratios (arXiv 2507.18071)."""
    log_ratios = (logprobs.double() - old_logprobs.double()).split(lengths)
    masks = response_mask.split(lengths)
    s = torch.stack([values[mask].mean() for values, mask in zip(log_ratios, masks, strict=True)]).exp()
    a = advantages.double()
    return -torch.minimum(s * a, s.clamp(1 - clip_low, 1 + clip_high) * a).mean()


class LinearDefinition:
    """Log-probs, entropy and gradients of hidden @ weight.T. Kept: [T], [T, H] and [V, H], never [T, V]."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        self._hidden, self._weight, self._targets = hidden, weight, targets

    def outputs(self) -> tuple[Tensor, Tensor]:
        parts = [
            logprobs_and_entropy(self._logits(rows, self._weight.double()), self._targets[rows])
            for rows in blocks(len(self._hidden), len(self._weight))
        ]
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)

    def gradients(self, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = self._weight.double()
        grad_hidden = torch.zeros_like(self._hidden, dtype=torch.float64)
        grad_weight = torch.zeros_like(weight)
        for rows in blocks(len(self._hidden), len(weight)):
            grad_logits = logits_gradient(
                self._logits(rows, weight),
                self._targets[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ self._hidden[rows].double()
        return grad_hidden, grad_weight

    def _logits(self, rows: slice, weight: Tensor) -> Tensor:
        return self._hidden[rows].double() @ weight.t()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """inf for another shape. NaN stays NaN, which no limit lets through."""
    if actual.shape != expected.shape:
        return float("inf")
    return (actual.detach().double() - expected).abs().max().item()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual.double() - expected).norm() / expected.norm()).item()


def wrong(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """What is beyond its limit, in words; errors are named 'output …' or 'gradient …'."""
    limits = LIMITS[dtype]
    return [
        f"{name} {error:.1e} above {limits[name.split()[0]]:.0e}"
        for name, error in errors.items()
        if not error <= limits[name.split()[0]]
    ]
