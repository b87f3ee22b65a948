"""The loss of one micro-batch: policy loss, KL to the reference, entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.mismatch import Mismatch
from gspo_megatron.ops import PolicyLossStats, sequence_mean
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class Objective:
    """The terms are this rank's shares: sums over micro-batches, data- and context-parallel ranks give the
    values of the global batch. All but loss are detached."""

    loss: Tensor  # [] policy_loss + kl_coefficient · kl - entropy_coefficient · entropy, differentiable
    policy_loss: Tensor  # []
    entropy: Tensor  # [] nats per token, mean over sequences
    kl: Tensor | None  # [] k3, nats per token, mean over sequences; None without reference log-probs
    stats: PolicyLossStats


def k3(logprobs: Tensor, reference_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """e^(-d) - 1 + d with d = log π - log π_ref, in float64; [T], 0 outside the response.

    An estimate of KL(π ‖ π_ref) that is never negative; its gradient in log π is 1 - e^(-d).
    """
    policy = torch.where(response_mask, logprobs.double(), 0.0)  # selected first: no gradient through a masked NaN
    difference = policy - torch.where(response_mask, reference_logprobs.double(), 0.0)
    return torch.expm1(-difference) + difference


def objective(
    algorithm: Algorithm,
    logprobs: Tensor,  # [T]
    entropy: Tensor,  # [T]
    batch: MicroBatch,
    *,
    num_sequences: int,
    num_tokens: int | None = None,
    mismatch: Mismatch,
    cp_group: dist.ProcessGroup | None = None,
) -> Objective:
    """The whole loss of one micro-batch on this rank, to be summed, not averaged.

    Args:
        logprobs: of the policy being trained, at the sampling temperature; differentiable.
        entropy: of its distributions; differentiable where entropy_coefficient is not 0.
        batch: with old_logprobs, and with reference_logprobs where the algorithm needs them.
        num_sequences: sequences in the global batch of this optimizer step.
        num_tokens: response tokens in it, for algorithms that take their mean over them.
        mismatch: weights of the policy term; KL and entropy are not weighted.
        cp_group: context-parallel group, if the batch is this rank's share of its tokens.
    """
    policy_loss, stats = algorithm.loss(
        logprobs,
        batch,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        weights=mismatch.weights(batch, logprobs, cp_group),
        cp_group=cp_group,
    )

    def mean(values: Tensor) -> Tensor:
        return sequence_mean(
            values,
            batch.response_mask,
            batch.cu_seqlens,
            num_sequences=num_sequences,
            cp_group=cp_group,
            implementation=algorithm.implementation,
        ).to(policy_loss.dtype)

    loss = policy_loss
    kl = None
    if batch.reference_logprobs is not None:
        kl = mean(k3(logprobs, batch.reference_logprobs, batch.response_mask))
        if algorithm.kl_coefficient:
            loss = loss + algorithm.kl_coefficient * kl
    else:
        assert not algorithm.needs_reference, "kl_coefficient > 0 needs the reference log-prob pass"
    if algorithm.entropy_coefficient:
        mean_entropy = mean(entropy)
        loss = loss - algorithm.entropy_coefficient * mean_entropy
    else:
        mean_entropy = mean(entropy.detach())  # logged only: costs no backward
    return Objective(
        loss=loss,
        policy_loss=policy_loss.detach(),
        entropy=mean_entropy.detach(),
        kl=None if kl is None else kl.detach(),
        stats=stats,
    )
