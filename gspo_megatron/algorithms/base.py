"""What an algorithm is: its settings, advantages of a group, and a policy loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.mismatch import Mismatch
from gspo_megatron.errors import UserError
from gspo_megatron.ops import Implementation, PolicyLossStats, sequence_policy_loss
from gspo_megatron.ops.reference import Level
from gspo_megatron.types import MicroBatch

# How token terms become a loss: the mean over a response's tokens, then over responses; the sum over a response's
# tokens, then the mean over responses; or the mean over all tokens of the global batch.
Aggregation = Literal["sequence_mean", "token_sum", "token_mean"]

# Keeps rewards that differ by rounding alone from becoming advantages of ±1. Rewards are of the order of 1.
STD_EPSILON = 1e-6


@dataclass(frozen=True)
class Algorithm(ABC):
    """Resolved settings of an objective. A subclass gives its name, its level, its own settings and its loss.

    Fields but `implementation` carry the names of `AlgorithmConfig`, where each is explained; a field of None there
    takes the default of the class, and one that the class does not have is refused.
    """

    name: ClassVar[str]
    level: ClassVar[Level]  # what a ratio belongs to: the whole sequence, or one token
    aggregation: ClassVar[Aggregation] = "sequence_mean"
    usual_clip_below: ClassVar[float | None] = None  # a clip of this or more is refused unless allowed
    default_mismatch: ClassVar[Mismatch] = Mismatch()  # where algorithm.mismatch is not set

    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    normalize_std: bool = True
    mini_batches: int = 4
    dynamic_sampling: bool = False
    implementation: Implementation = "native"  # of the operations: kernels.implementation

    def __post_init__(self) -> None:
        if self.kl_coefficient < 0:
            raise UserError(f"algorithm.kl_coefficient={self.kl_coefficient} must be at least 0; 0 switches it off")

    @property
    def clip(self) -> tuple[float, float] | None:
        """(clip_low, clip_high), outside whose band a ratio may lose its gradient; None where there is none."""
        low, high = getattr(self, "clip_low", None), getattr(self, "clip_high", None)
        return None if low is None or high is None else (low, high)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities are part of the loss."""
        return self.kl_coefficient > 0

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantage of each rollout of a group: (r - mean) / (std + 1e-6), or r - mean without normalize_std.

        The standard deviation is the unbiased one (n - 1); the paper leaves it open. A group whose rewards are
        all equal, or with fewer than two rewards, gets exactly 0.

        Args:
            rewards: [G] or [groups, G], one group a row; NaN for a rollout to leave out of the statistics.

        Returns:
            float32 of the same shape; 0 where the reward was NaN.
        """
        is_kept = ~rewards.isnan()
        kept = torch.where(is_kept, rewards.double(), 0.0)
        count = is_kept.sum(-1, keepdim=True)
        centred = torch.where(is_kept, kept - kept.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
        if self.normalize_std:
            variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
            centred = centred / (variance.sqrt() + STD_EPSILON)
        # Equal rewards leave a rounding error of the mean, not 0, behind.
        return torch.where(self.is_informative(rewards)[..., None], centred, 0.0).float()

    @staticmethod
    def is_informative(rewards: Tensor) -> Tensor:
        """Whether a group's rewards differ, so that it has a gradient: what dynamic sampling keeps.

        Args:
            rewards: [G] or [groups, G], NaN for a rollout left out.

        Returns:
            bool [] or [groups].
        """
        is_out = rewards.isnan()
        return rewards.masked_fill(is_out, -torch.inf).amax(-1) > rewards.masked_fill(is_out, torch.inf).amin(-1)

    @abstractmethod
    def loss(
        self,
        logprobs: Tensor,  # [T]
        batch: MicroBatch,
        *,
        num_sequences: int,
        num_tokens: int | None = None,
        weights: Tensor | None = None,  # [T]
        cp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, PolicyLossStats]:
        """This rank's share of the policy loss, without KL and entropy terms (total_loss.py adds them).

        Args:
            logprobs: of the policy being trained, differentiable.
            batch: holds the trainer's old_logprobs, the mask and the advantages.
            num_sequences: sequences in the global batch of this optimizer step.
            num_tokens: response tokens in it, for aggregation "token_mean".
            weights: detached mismatch weights.
            cp_group: context-parallel group, if the batch is this rank's share of its tokens.
        """

    def check_one_advantage_each(self, batch: MicroBatch) -> None:
        """Raise ValueError unless advantages are [S]."""
        num_sequences = batch.cu_seqlens.numel() - 1
        if batch.advantages.numel() != num_sequences:
            raise ValueError(
                f"{self.name} takes one advantage a response, [{num_sequences}], and was given "
                f"{tuple(batch.advantages.shape)}; use gspo_token for advantages that vary by token"
            )


@dataclass(frozen=True, kw_only=True)
class ClippedAlgorithm(Algorithm):
    """An objective made of `ops.sequence_policy_loss`, at its level, with its clip."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None

    def clipped_loss(
        self,
        logprobs: Tensor,
        batch: MicroBatch,
        advantages: Tensor,  # [S] or [T]
        *,
        num_sequences: int,
        weights: Tensor | None,
        cp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, PolicyLossStats]:
        """`ops.sequence_policy_loss` at this algorithm's level and clip."""
        assert batch.old_logprobs is not None, "the old log-prob pass comes before the first mini-batch"
        return sequence_policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.response_mask,
            batch.cu_seqlens,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            num_sequences=num_sequences,
            level=self.level,
            weights=weights,
            cp_group=cp_group,
            implementation=self.implementation,
        )
