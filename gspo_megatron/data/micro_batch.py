"""Sequences packed end to end into one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from gspo_megatron.types import MicroBatch, Sequence


def pack(sequences: SequenceOf[Sequence], *, multiple_of: int, pad_token_id: int, device: torch.device) -> MicroBatch:
    """One micro-batch; a trailing padding sequence fills T up to `multiple_of` tokens.

    With no sequences at all the micro-batch is padding alone: it trains nothing, but its collectives run.
    """
    num_tokens = sum(s.token_ids.numel() for s in sequences)
    # Sequence parallelism cuts T over the tensor-parallel ranks.
    padding = -num_tokens % multiple_of if num_tokens else max(multiple_of, 2)
    lengths = [s.token_ids.numel() for s in sequences] + ([padding] if padding else [])
    per_token_advantages = any(s.advantages.dim() == 1 for s in sequences)

    def joined(parts: list[Tensor], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.cat([*(p.to(dtype) for p in parts), torch.full((padding,), fill, dtype=dtype)])

    def shifted(x: Tensor, last: float) -> Tensor:
        """Entry t says something about token t+1."""
        return torch.cat([x[1:], x.new_full((1,), last)])

    if per_token_advantages:
        spread = [shifted(s.advantages.expand(s.token_ids.shape), 0) for s in sequences]
        advantages = joined(spread, 0, torch.float32)
    else:
        advantages = torch.tensor([float(s.advantages) for s in sequences] + [0.0] * bool(padding))
    micro = MicroBatch(
        token_ids=joined([s.token_ids for s in sequences], pad_token_id, torch.int64),
        targets=joined([shifted(s.token_ids, pad_token_id) for s in sequences], pad_token_id, torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequence_ids=torch.tensor([s.index for s in sequences] + [-1] * bool(padding)),
        response_mask=joined([shifted(s.response_mask, 0) for s in sequences], 0, torch.bool),
        rollout_logprobs=joined([shifted(s.rollout_logprobs, 0) for s in sequences], 0, torch.float32),
        advantages=advantages,
        max_seqlen=max(lengths),
    )
    for name, value in vars(micro).items():
        if isinstance(value, Tensor):
            setattr(micro, name, value.to(device))
    return micro
