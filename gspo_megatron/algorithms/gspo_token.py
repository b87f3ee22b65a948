"""GSPO-token: GSPO's ratio with an advantage for each token (arXiv 2507.18071, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.algorithms.gspo import GSPO
from gspo_megatron.ops import PolicyLossStats
from gspo_megatron.ops.reference import sequence_of_token
from gspo_megatron.types import MicroBatch


@dataclass(frozen=True)
class GSPOToken(GSPO):
    """s_it = sg[s_i] · π(y_it) / sg[π(y_it)]: the response's ratio in value, the token's own gradient.

    Each token is clipped by the sign of its own advantage. With one advantage a response it equals GSPO in
    value, clip and gradient; it exists for advantages that vary inside a response, as over several turns.
    """

    name: ClassVar[str] = "gspo_token"

    def loss(
        self,
        logprobs: Tensor,
        batch: MicroBatch,
        *,
        num_sequences: int,
        num_tokens: int | None = None,
        weights: Tensor | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, PolicyLossStats]:
        advantages = batch.advantages
        num_local = batch.cu_seqlens.numel() - 1
        if advantages.numel() == num_local and num_local > 0:
            # Tokens behind the last sequence are masked; any advantage does for them.
            sequences = sequence_of_token(batch.cu_seqlens, logprobs.numel())
            advantages = advantages[sequences.clamp(max=num_local - 1)]
        return self.clipped_loss(
            logprobs, batch, advantages, num_sequences=num_sequences, weights=weights, cp_group=cp_group
        )
