"""Core attention over packed sequences, without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack (Megatron's THD format).

    The pack is spread out to [S, longest] rows for scaled_dot_product_attention; a causal mask keeps the
    padding behind each row's end out of the row itself.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,  # [T, heads, head_dim]
        key: Tensor,  # [T, groups, head_dim]
        value: Tensor,  # [T, groups, head_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, heads × head_dim]
        assert packed_seq_params is not None and attention_bias is None
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q)
        num_tokens = query.shape[0]
        token = torch.arange(num_tokens, device=query.device, dtype=cu_seqlens.dtype)
        row = torch.searchsorted(cu_seqlens, token, right=True) - 1
        place = row * longest + (token - cu_seqlens[row])  # of each token among the spread-out rows

        def spread(x: Tensor) -> Tensor:  # [S, heads, longest, head_dim]
            rows = x.new_zeros(((cu_seqlens.numel() - 1) * longest, *x.shape[1:])).index_copy(0, place, x)
            return rows.view(-1, longest, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(query),
            spread(key),
            spread(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, place).flatten(1)
