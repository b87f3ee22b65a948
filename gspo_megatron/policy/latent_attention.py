"""Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437): queries, keys and values through a low rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from gspo_megatron.policy.attention import PackedSequences, Rotate
from gspo_megatron.policy.collectives import SumGradient
from gspo_megatron.weights.families.deepseek_v3 import LatentAttentionFields


def latent_settings(fields: LatentAttentionFields) -> dict[str, Any]:
    """Megatron's settings of it. `rope` and the two numbers after it only make Megatron's scale of the scores: the
    rotation is ours."""
    yarn = fields.yarn
    return {
        "q_lora_rank": fields.q_lora_rank,
        "kv_lora_rank": fields.kv_lora_rank,
        "qk_head_dim": fields.qk_nope_head_dim,
        "qk_pos_emb_head_dim": fields.qk_rope_head_dim,
        "v_head_dim": fields.v_head_dim,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0 if yarn is None else yarn.factor,
        "mscale_all_dim": 0.0 if yarn is None else yarn.mscale_all_dim or 0.0,
    }


class LatentAttention(MLASelfAttention):
    """Megatron's, with packed sequences rotated by the micro-batch's plan, and the right gradient of the key that all
    heads share: each tensor-parallel rank uses it in its own heads, and Megatron never adds up what they give back."""

    def __init__(self, *args: Any, rope_interleave: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rope_interleave = rope_interleave

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSequences | None = None,
        inference_context: None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """hidden_states [T/tp, 1, H] -> query and key [T, local heads, qk_head_dim + rope], value [T, local heads,
        v_head_dim], and two Nones where Megatron hands out the compressed ones."""
        assert packed_seq_params is not None
        config, nope = self.config, self.config.qk_head_dim
        query = self._heads(self._query(hidden_states))
        latent = self._whole(self.linear_kv_down_proj(hidden_states)[0])
        latent, shared_key = latent.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
        expanded = self._heads(self.linear_kv_up_proj(self.kv_layernorm(self._own_tokens(latent)))[0])
        key, value = expanded.split([nope, config.v_head_dim], -1)

        rotation = packed_seq_params.rotation(query.shape[0], query.dtype)
        shared_key = Rotate.apply(self._pairs_apart(SumGradient.apply(shared_key, self.pg_collection.tp)), *rotation)
        turned = Rotate.apply(self._pairs_apart(query[..., nope:]), *rotation)
        query = torch.cat([query[..., :nope], turned], -1)
        key = torch.cat([key, shared_key.expand(-1, key.shape[1], -1)], -1)
        return query, key, value, None, None

    def _query(self, hidden: Tensor) -> Tensor:
        """[T, 1, local heads × head_dim]"""
        if self.config.q_lora_rank is None:
            query: Tensor = self.linear_q_proj(hidden)[0]
            return query
        compressed = self._own_tokens(self._whole(self.linear_q_down_proj(hidden)[0]))
        query = self.linear_q_up_proj(self.q_layernorm(compressed))[0]
        return query

    def _whole(self, shard: Tensor) -> Tensor:
        """[T, 1, rank/tp] of a column-parallel product -> [T, 1, rank]."""
        whole: Tensor = gather_from_tensor_model_parallel_region(shard, group=self.pg_collection.tp)
        return whole

    def _own_tokens(self, x: Tensor) -> Tensor:
        """[T, …] -> [T/tp, …]: the norms see a part of the sequence, as all others do."""
        if not self.config.sequence_parallel:
            return x
        own: Tensor = scatter_to_sequence_parallel_region(x, group=self.pg_collection.tp)
        return own

    def _heads(self, x: Tensor) -> Tensor:
        """[T, 1, local heads × d] -> [T, local heads, d]"""
        return x.view(x.shape[0], self.num_attention_heads_per_partition, -1)

    def _pairs_apart(self, x: Tensor) -> Tensor:
        """[T, heads, rope], rotated pairs side by side -> first numbers of all pairs, then second ones, as Rotate wants
        them. Scores don't depend on the order, which is the same in queries and keys."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.rope_interleave else x.contiguous()
