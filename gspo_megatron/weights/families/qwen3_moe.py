"""Qwen3-MoE: Qwen3's attention, a softmax router over the chosen experts, no shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gspo_megatron.weights.families import qwen3
from gspo_megatron.weights.families.base import (
    ConfigReader,
    Family,
    ModelFields,
    attention_and_norm_rules,
    dense_mlp_rules,
    expert_rules,
)
from gspo_megatron.weights.rules import Rule


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a Qwen3MoeForCausalLM config."""
    read = ConfigReader(config)
    # Left out, it is not the dense family's constant.
    head_dim = read.optional("head_dim", read("hidden_size") // read("num_attention_heads"))
    return replace(
        qwen3.fields(config),
        head_dim=head_dim,
        num_experts=read("num_experts", "num_local_experts"),
        experts_per_token=read.experts_per_token(renormalised=read("norm_topk_prob")),
        expert_ffn_hidden_size=read("moe_intermediate_size"),
        moe_layers=read.sparse_layers(),
        router_pre_softmax=not read("norm_topk_prob"),
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [*attention_and_norm_rules(f), *dense_mlp_rules(f), *expert_rules(f)]


FAMILY = Family("qwen3_moe", fields, rules, known_to_servers=True, known_to_transformer_engine=True)
