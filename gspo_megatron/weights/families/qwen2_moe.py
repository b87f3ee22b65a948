"""Qwen2-MoE (Qwen1.5-MoE too): biases on queries, keys and values; a shared expert behind a gate."""

from __future__ import annotations

from typing import Any

from gspo_megatron.weights.families.base import (
    ConfigReader,
    Family,
    ModelFields,
    attention_and_norm_rules,
    dense_mlp_rules,
    expert_rules,
    shared_expert_rules,
)
from gspo_megatron.weights.rules import Rule


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a Qwen2MoeForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("use_sliding_window", [False], "sliding-window attention is not implemented for this family")
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    heads, renormalised = read("num_attention_heads"), read.optional("norm_topk_prob", False)
    return ModelFields(
        num_layers=read("num_hidden_layers"),
        hidden_size=read("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=read("num_key_value_heads"),
        head_dim=config.get("head_dim") or read("hidden_size") // heads,
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read("rms_norm_eps"),
        rope_theta=read.rope_theta(),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=False,
        qkv_bias=read.optional("qkv_bias", True),
        num_experts=read("num_experts", "num_local_experts"),
        experts_per_token=read.experts_per_token(renormalised=renormalised),
        expert_ffn_hidden_size=read("moe_intermediate_size"),
        moe_layers=read.sparse_layers(),
        router_pre_softmax=not renormalised,
        shared_ffn_hidden_size=read("shared_expert_intermediate_size"),
        shared_expert_gate=True,
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [
        *attention_and_norm_rules(f),
        *dense_mlp_rules(f),
        *expert_rules(f),
        *shared_expert_rules(f, module="shared_expert"),
    ]


FAMILY = Family("qwen2_moe", fields, rules)
