"""OLMoE: queries and keys normalised over all heads together, many small experts in every layer."""

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
    """Fields of an OlmoeForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("attention_bias", [False], "biases in attention have no rule for this family")
    read.refuse_unless("clip_qkv", [None], "queries, keys and values are not clipped")
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    num_layers, heads = read("num_hidden_layers"), read("num_attention_heads")
    renormalised = read.optional("norm_topk_prob", False)
    return ModelFields(
        num_layers=num_layers,
        hidden_size=read("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=read("hidden_size") // heads,
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read.optional("rms_norm_eps", 1e-5),
        rope_theta=read.rope_theta(),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=True,
        qk_norm_of_heads=False,
        num_experts=read("num_experts", "num_local_experts"),
        experts_per_token=read.experts_per_token(renormalised=renormalised),
        expert_ffn_hidden_size=read("intermediate_size"),
        moe_layers=tuple(range(num_layers)),
        router_pre_softmax=not renormalised,
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [*attention_and_norm_rules(f), *expert_rules(f)]


FAMILY = Family("olmoe", fields, rules, known_to_servers=True, split_by_servers=False)
