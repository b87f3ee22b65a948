"""The operations over csrc, one differentiable custom operator each; they equal ops/reference.py."""

from __future__ import annotations

from gspo_megatron.ops.native.logprobs import linear_logprobs, token_logprobs
from gspo_megatron.ops.native.policy_loss import sequence_mean, sequence_policy_loss

__all__ = ["linear_logprobs", "sequence_mean", "sequence_policy_loss", "token_logprobs"]
