"""Qwen3, dense. The control twin of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from gspo_megatron.weights.families.base import (
    ConfigReader,
    Family,
    ModelFields,
    attention_and_norm_rules,
    dense_mlp_rules,
)
from gspo_megatron.weights.rules import Rule

DEFAULT_HEAD_DIM = 128  # what transformers takes where config.json leaves head_dim out, whatever the hidden size


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a Qwen3ForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("attention_bias", [False], "biases in attention have no rule")
    read.refuse_unless("use_sliding_window", [False], "sliding-window attention is not implemented")
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    return ModelFields(
        num_layers=read("num_hidden_layers"),
        hidden_size=read("hidden_size"),
        num_attention_heads=read("num_attention_heads"),
        num_query_groups=read("num_key_value_heads"),
        head_dim=read.optional("head_dim", DEFAULT_HEAD_DIM),
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read("rms_norm_eps"),
        rope_theta=read.rope_theta(),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=True,
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    return [*attention_and_norm_rules(f), *dense_mlp_rules(f)]


FAMILY = Family("qwen3", fields, rules, known_to_servers=True, known_to_transformer_engine=True)
