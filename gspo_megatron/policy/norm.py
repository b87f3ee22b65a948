"""RMSNorm in plain torch that works with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from gspo_megatron.groups import Group
from gspo_megatron.policy.collectives import SumOverRanks


class _Normalise(torch.autograd.Function):
    """torch's rms_norm over the last axis, to the bit, with a backward pass in few steps.

    On the CPU torch differentiates its own through each elementary step, at three times the cost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        [gradient], (x, weight, scale) = gradients, ctx.saved_tensors
        wide = gradient.to(scale.dtype)
        normal = x * scale
        by_weight = wide * normal
        along = (by_weight @ weight.to(scale.dtype)).unsqueeze(-1).div_(-x.shape[-1])
        grad_x = (wide * weight).addcmul_(normal, along).mul_(scale)
        return grad_x.to(x.dtype), by_weight.flatten(0, -2).sum(0).to(weight.dtype), None


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight says that it sees only a part of the sequence.

    The mark makes Megatron sum the weight's gradient over the tensor-parallel group; its own wrapper of
    torch's norms refuses sequence parallelism instead.
    """

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> like x."""
        if x.is_cuda:  # there torch has a kernel for each direction
            return super().forward(x)
        output: Tensor = _Normalise.apply(x, self.weight, self.eps)
        return output


class ProjectionNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together (OLMoE), where each tensor-parallel rank holds some heads.

    The weight is a shard of the whole one. Megatron must not be told of it by `qk_layernorm`: it would sum the shards'
    gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int) -> None:
        """`hidden_size` is a head's, as Megatron gives it; `heads` those of all ranks."""
        super().__init__()
        self.group: Group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        self.eps, self.size = eps, heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.size // self.group.size(), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., local heads, head_dim] -> like x."""
        flat = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
        squares = SumOverRanks.apply(flat.square().sum(-1, keepdim=True), self.group)
        normal = flat * torch.rsqrt(squares / self.size + self.eps)
        return (normal * self.weight).to(x.dtype).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For dist_checkpointing: a shard along the only axis."""
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return state
