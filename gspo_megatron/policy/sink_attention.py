"""Attention with a sink and a sliding window (gpt-oss).

A sink is one more number in each head's softmax, learned, that stands for no token: with scores s_j of the keys a query
sees and the head's sink b, the weights are w_j = exp s_j / (exp b + Σ_k exp s_k), and add up to less than 1.

With Z = Σ_k exp s_k an ordinary kernel gives out = Σ_j exp(s_j)/Z · v_j and lse = log Z. Then out' = out · σ(lse − b),
and with lse' = log(Z + exp b) in its place the kernel's own backward pass is right: it recomputes w_j = exp(s_j − lse')
and subtracts ⟨gradient, out'⟩. The sink's gradient is −Σ σ(b − lse) · ⟨gradient, out'⟩.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from gspo_megatron.groups import Group
from gspo_megatron.policy.attention import AttentionPlan, PackedAttention, uses_flash

flash_forward = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward


class SinkAttention(PackedAttention):
    """PackedAttention whose heads have sinks and whose layers may see the last tokens only."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *args: Any, windows: Sequence[int | None], **kwargs: Any
    ) -> None:
        """`windows`: of all layers of the model, tokens that a query sees, itself included; None: all before it."""
        super().__init__(config, layer_number, *args, **kwargs)
        self.window = windows[layer_number - 1]
        self.tp_group: Group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        heads = config.num_attention_heads // self.tp_group.size()
        self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """As PackedAttention's."""
        if uses_flash(query):
            return FlashWithSinks.apply(query, key, value, self.softmax_offset, plan, self.scale, self.window)
        return attend_with_sinks(query, key, value, self.softmax_offset, plan, scale=self.scale, window=self.window)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For dist_checkpointing: a shard of heads."""
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return state


def attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, plan: AttentionPlan, *, scale: float, window: int | None
) -> Tensor:
    """The definition, in float32 or better. Its memory grows with the square of the longest sequence.

    query [T, heads, head_dim]; key, value [K, groups, head_dim]; sinks [heads] -> like query.
    """
    lengths_q, lengths_k = plan.segment_lengths
    repeats = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.transpose(0, 1).to(wide) for x in (query, key, value))  # [heads, T or K, head_dim]
    key, value = (x.repeat_interleave(repeats, 0) for x in (key, value))
    outputs = []
    for q, k, v in zip(query.split(lengths_q, 1), key.split(lengths_k, 1), value.split(lengths_k, 1), strict=True):
        hidden = ~visible(q.shape[1], k.shape[1], window, q.device)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        column = sinks.to(wide)[:, None, None].expand(-1, q.shape[1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs).to(sinks.dtype)


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: the last query sees the last key; none sees a key behind itself, nor one that is
    `window` or more tokens before."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return seen if window is None else seen.triu(num_keys - num_queries - window + 1)


class FlashWithSinks(torch.autograd.Function):
    """`attend_with_sinks` by torch's variable-length flash attention; see the module's formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        where = (plan.cu_seqlens_query, plan.cu_seqlens_key, plan.longest_query, plan.longest_key)
        how = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        plain, lse, rng_state, unused, _ = flash_forward(query, key, value, *where, 0.0, False, False, **how)
        column = _column(sinks)  # lse [heads, T] float32
        output = (plain * torch.sigmoid(lse - column).T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, lse, rng_state, unused)
        ctx.where, ctx.how = where, how
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, lse, rng_state, unused = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        column = _column(sinks)
        with_sink = torch.logaddexp(lse, column)
        grad_query, grad_key, grad_value = flash_backward(
            gradient, query, key, value, output, with_sink, *ctx.where, 0.0, False, rng_state, unused, **ctx.how
        )
        along = (gradient.to(column.dtype) * output).sum(-1).T  # [heads, T]
        grad_sinks = -(torch.exp(column - with_sink) * along).sum(1)
        return grad_query, grad_key, grad_value, grad_sinks.to(sinks.dtype), None, None, None


def _column(sinks: Tensor) -> Tensor:
    """[heads, 1] in float32 or better."""
    return sinks.to(torch.promote_types(sinks.dtype, torch.float32))[:, None]
