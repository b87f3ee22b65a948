"""Mixtral: Llama's attention, a softmax router over the chosen experts in every layer."""

from __future__ import annotations

from typing import Any

from gspo_megatron.weights.families.base import (
    ConfigReader,
    Family,
    ModelFields,
    attention_and_norm_rules,
    expert_rules,
)
from gspo_megatron.weights.rules import Rule


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a MixtralForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("sliding_window", [None], "sliding-window attention is not implemented for this family")
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    num_layers, heads = read("num_hidden_layers"), read("num_attention_heads")
    return ModelFields(
        num_layers=num_layers,
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
        num_experts=read("num_local_experts", "num_experts"),
        experts_per_token=read.experts_per_token(renormalised=True),
        expert_ffn_hidden_size=read("intermediate_size"),
        moe_layers=tuple(range(num_layers)),
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [*attention_and_norm_rules(f), *expert_rules(f, module="block_sparse_moe", projections=("w1", "w3", "w2"))]


FAMILY = Family("mixtral", fields, rules, known_to_servers=True)
