"""Angles by which queries and keys are rotated, plain and with YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gspo_megatron.weights.families.base import ModelFields, Yarn


class Rotary:
    """The rotary embedding of a model: an angle for each position and pair of numbers of a head.

    YaRN (arXiv 2309.00071) divides the low frequencies by its factor, keeps the high ones, and scales what it rotates.
    """

    def __init__(self, dim: int, theta: float, yarn: Yarn | None = None) -> None:
        """`dim`: rotated numbers of a head."""
        powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.frequencies = 1.0 / powers if yarn is None else _yarn_frequencies(powers, dim, theta, yarn)  # [dim / 2]
        self.factor = 1.0 if yarn is None else yarn.rotation_factor  # on cosine and sine
        self._angles = torch.empty(0, 1, 1, dim)

    @classmethod
    def of(cls, fields: ModelFields) -> Rotary:
        """The model's."""
        return cls(fields.rotary_dim or fields.head_dim, fields.rope_theta, fields.yarn)

    def angles(self, length: int, device: torch.device) -> Tensor:
        """[≥ length, 1, 1, dim] float32, of each position; kept for later calls."""
        if self._angles.shape[0] < length or self._angles.device != device:
            positions = torch.arange(max(length, 2 * self._angles.shape[0]), dtype=torch.float32, device=device)
            half = torch.outer(positions, self.frequencies.to(device))
            self._angles = torch.cat([half, half], -1)[:, None, None]
        return self._angles


def _yarn_frequencies(powers: Tensor, dim: int, theta: float, yarn: Yarn) -> Tensor:
    """[dim / 2]: those that turn less than `beta_slow` times in the original context are divided by the factor."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (yarn.factor * powers) * (1 - kept) + 1.0 / powers * kept
