"""What the objectives in plain torch share: response tokens, sums over each response, and the loss made of token terms.

Everything is float64, detached, and selected with the response mask before any arithmetic (0 · NaN is NaN). Nothing
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron.ops import PolicyLossStats, check_policy_tokens
from gspo_megatron.ops.known_gradient import with_gradient
from gspo_megatron.ops.reference import all_reduce, sequence_of_token, sums_per_sequence
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class Responses:
    """The response tokens of a micro-batch. Sums go over whole responses: over context-parallel ranks too.

    [S+1] has a last entry for tokens behind the last sequence.
    """

    mask: Tensor  # [T] bool
    sequences: Tensor  # [T] int64, the sequence of each token; S for tokens behind the last one
    num_tokens: Tensor  # [S+1] T_i
    cp_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, batch: MicroBatch, cp_group: dist.ProcessGroup | None = None) -> Responses:
        num_sequences = batch.cu_seqlens.numel() - 1
        sequences = sequence_of_token(batch.cu_seqlens, batch.response_mask.numel())
        mask = batch.response_mask & (sequences < num_sequences)
        counts = sums_per_sequence(mask.double()[None], sequences, num_sequences)
        return cls(mask, sequences, all_reduce(counts, dist.ReduceOp.SUM, cp_group)[0], cp_group)

    def select(self, values: Tensor) -> Tensor:
        """[T] → [T] the values of response tokens, 0 elsewhere."""
        return torch.where(self.mask, values.detach().double(), 0.0)

    def advantages(self, batch: MicroBatch) -> Tensor:
        """[T] each response token's advantage, 0 elsewhere."""
        advantages = batch.advantages
        if advantages.numel() == batch.cu_seqlens.numel() - 1:
            advantages = self.spread(F.pad(advantages, (0, 1)))
        return self.select(advantages)

    def sums(self, *values: Tensor) -> Tensor:
        """k times [T], 0 outside the responses → [k, S+1]."""
        sums = sums_per_sequence(torch.stack(values), self.sequences, self.num_tokens.numel() - 1)
        return all_reduce(sums, dist.ReduceOp.SUM, self.cp_group)

    def mean(self, values: Tensor) -> Tensor:
        """[T], 0 outside the responses → [S+1]; 0 for a sequence without response tokens."""
        return self.sums(values)[0] / self.lengths

    def spread(self, values: Tensor) -> Tensor:
        """[S+1] → [T] each token's sequence's value."""
        return values[self.sequences]

    @property
    def lengths(self) -> Tensor:
        """[S+1] T_i to divide by: at least 1."""
        return self.num_tokens.clamp(min=1.0)


@dataclass(frozen=True)
class PolicyTokens:
    """What an objective is made of, per token; 0 outside the responses."""

    responses: Responses
    logprobs: Tensor  # [T] log π
    log_ratio: Tensor  # [T] log(π / π_old)
    advantages: Tensor  # [T]

    @classmethod
    def of(cls, logprobs: Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup | None) -> PolicyTokens:
        assert batch.old_logprobs is not None, "the old log-prob pass comes before the first mini-batch"
        old = batch.old_logprobs
        check_policy_tokens(logprobs, old, batch.response_mask, batch.cu_seqlens, batch.advantages, num_sequences=1)
        responses = Responses.of(batch, cp_group)
        policy = responses.select(logprobs)
        # Subtracted per token, before any sum: a difference of sums has lost the digits that matter.
        return cls(responses, policy, policy - responses.select(old), responses.advantages(batch))

    def by_sign(self, positive: float, negative: float) -> Tensor:
        """[T] a setting by the sign of the advantage."""
        return torch.where(self.advantages > 0, positive, torch.full_like(self.advantages, negative))


def token_loss(
    logprobs: Tensor,  # [T]
    tokens: PolicyTokens,
    *,
    value: Tensor,  # [T]
    slope: Tensor,  # [T]
    divisor: Tensor | int,  # [T], or one for all
    weights: Tensor | None,  # [T]
    clipped: Tensor | None = None,  # [T] bool
) -> tuple[Tensor, PolicyLossStats]:
    """-Σ_t ω_t · value_t / divisor_t over response tokens, with the gradient -ω_t · slope_t / divisor_t in log π_t.

    A token whose advantage or weight is 0 counts for nothing, however large its ratio (0 · inf is NaN).

    Args:
        logprobs: of the policy, differentiable.
        value: each token's term of the objective, to be maximised.
        slope: its derivative in the token's log π, what is detached in the objective held fixed.
        divisor: made of global counts only, so that ranks' and micro-batches' shares add up.
        weights: detached mismatch weights ω; None: 1.
        clipped: what the statistics count as clipped; None: nothing.

    Returns:
        loss [], this rank's share, of the dtype of logprobs; and PolicyLossStats.
    """
    responses = tokens.responses
    is_idle = ~responses.mask | (tokens.advantages == 0)
    if weights is not None:
        omega = responses.select(weights)
        is_idle |= omega == 0
        value, slope = value * omega, slope * omega
    loss = -torch.where(is_idle, 0.0, value / divisor).sum()
    gradient = torch.where(is_idle, 0.0, -slope / divisor)
    if clipped is None:
        clipped = torch.zeros_like(responses.mask)
    sum_log_ratio, num_clipped = responses.sums(tokens.log_ratio, clipped.double())
    stats = PolicyLossStats(
        log_ratio=(sum_log_ratio / responses.lengths)[:-1].to(logprobs.dtype),
        clipped=num_clipped[:-1] > 0,
        clipped_tokens=clipped,
        num_response_tokens=responses.num_tokens[:-1].long(),
    )
    return with_gradient(logprobs, loss, gradient), stats
