"""GLM-4-MoE (GLM-4.5, 4.6): half of each head rotated, a sigmoid router with a selection bias, shared experts."""

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

DEFAULT_ROTARY_FACTOR = 0.5  # what transformers takes where config.json leaves partial_rotary_factor out


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a Glm4MoeForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    read.refuse_unless("scoring_func", ["sigmoid"], "this family's router scores by sigmoid")
    read.refuse_unless("topk_method", ["noaux_tc"], "experts are chosen with a selection bias")
    num_layers, heads, first_moe_layer = (
        read("num_hidden_layers"),
        read("num_attention_heads"),
        read("first_k_dense_replace"),
    )
    head_dim = config.get("head_dim") or read("hidden_size") // heads
    beside = read.optional("partial_rotary_factor", DEFAULT_ROTARY_FACTOR)
    rotary = ConfigReader(read.rope()).optional("partial_rotary_factor", beside)
    groups, groups_chosen = read.expert_groups(1, 1)
    return ModelFields(
        num_layers=num_layers,
        hidden_size=read("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=read("num_key_value_heads"),
        head_dim=head_dim,
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read("rms_norm_eps"),
        rope_theta=read.rope_theta(),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=read.optional("use_qk_norm", False),
        qkv_bias=read.optional("attention_bias", False),
        rotary_dim=int(head_dim * rotary),
        num_experts=read("n_routed_experts", "num_local_experts"),
        experts_per_token=read.experts_per_token(renormalised=read.renormalised_sigmoid()),
        expert_ffn_hidden_size=read("moe_intermediate_size"),
        moe_layers=tuple(range(first_moe_layer, num_layers)),
        router_score="sigmoid",
        router_selection_bias=True,
        router_groups=groups,
        router_groups_chosen=groups_chosen,
        router_scale=read.optional("routed_scaling_factor", 1.0),
        shared_ffn_hidden_size=read.shared_ffn_hidden_size(),
        further_token_layers=read.further_token_layers(),
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [*attention_and_norm_rules(f), *dense_mlp_rules(f), *expert_rules(f), *shared_expert_rules(f)]


FAMILY = Family("glm4_moe", fields, rules, known_to_servers=True)
