"""DeepSeek-V3 (R1 too, and Kimi-K2 under this name): latent attention, first layers dense, routed and shared experts.

Names are those of Megatron's local modules, where both down-projections are column-parallel. Transformer Engine's
modules hold them whole on every rank and fuse the norms into the up-projections.
"""

from __future__ import annotations

from dataclasses import dataclass
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

DEFAULT_QUERY_RANK = 1536  # what transformers takes where config.json leaves q_lora_rank out; null is another thing


@dataclass(frozen=True, kw_only=True)
class LatentAttentionFields(ModelFields):
    """`num_query_groups` is the number of heads and `head_dim` the width of a query or key: Megatron's latent attention
    makes its projections from the numbers below instead. `rotary_dim` is qk_rope_head_dim."""

    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    qk_nope_head_dim: int  # Megatron's qk_head_dim
    qk_rope_head_dim: int  # Megatron's qk_pos_emb_head_dim
    v_head_dim: int
    rope_interleave: bool  # pairs that are rotated together lie side by side

    @property
    def split_by_tensor(self) -> dict[str, int]:
        sizes = super().split_by_tensor | {"kv_lora_rank + qk_rope_head_dim": self.kv_lora_rank + self.qk_rope_head_dim}
        return sizes if self.q_lora_rank is None else sizes | {"q_lora_rank": self.q_lora_rank}


def fields(config: dict[str, Any]) -> LatentAttentionFields:
    """Fields of a DeepseekV3ForCausalLM config."""
    read = ConfigReader(config)
    read.refuse_unless("attention_bias", [False], "biases in attention have no rule")
    read.refuse_unless("hidden_act", ["silu"], "only SwiGLU is implemented")
    read.refuse_unless("moe_layer_freq", [1], "every layer after the dense ones has experts")
    read.refuse_unless("scoring_func", ["sigmoid"], "this family's router scores by sigmoid")
    read.refuse_unless("topk_method", ["noaux_tc"], "experts are chosen with a selection bias")
    read.refuse_unless("rms_norm_eps", [1e-6], "transformers takes 1e-6 in the norms of latents whatever it says")
    num_layers, first_moe_layer = read("num_hidden_layers"), read("first_k_dense_replace")
    groups, groups_chosen = read.expert_groups(8, 4)
    rope = read.rope()
    return LatentAttentionFields(
        num_layers=num_layers,
        hidden_size=read("hidden_size"),
        num_attention_heads=read("num_attention_heads"),
        num_query_groups=read("num_attention_heads"),
        head_dim=read("qk_nope_head_dim") + read("qk_rope_head_dim"),
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta") or read("rope_theta")),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=True,
        rotary_dim=read("qk_rope_head_dim"),
        yarn=read.yarn(),
        num_experts=read("n_routed_experts", "num_local_experts"),
        experts_per_token=read.experts_per_token(renormalised=read.renormalised_sigmoid()),
        expert_ffn_hidden_size=read("moe_intermediate_size"),
        moe_layers=tuple(range(first_moe_layer, num_layers)),
        router_score="sigmoid",
        router_selection_bias=True,
        router_groups=groups,
        router_groups_chosen=groups_chosen,
        router_scale=read.optional("routed_scaling_factor", 2.5),
        shared_ffn_hidden_size=read.shared_ffn_hidden_size(),
        further_token_layers=read.further_token_layers(),
        q_lora_rank=config.get("q_lora_rank", DEFAULT_QUERY_RANK),
        kv_lora_rank=read("kv_lora_rank"),
        qk_nope_head_dim=read("qk_nope_head_dim"),
        qk_rope_head_dim=read("qk_rope_head_dim"),
        v_head_dim=read("v_head_dim"),
        rope_interleave=read.optional("rope_interleave", True),
    )


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    assert isinstance(f, LatentAttentionFields)
    # Embedding, norms and head are those of all Llama-like families.
    common = [rule for rule in attention_and_norm_rules(f) if ".self_attention." not in rule.megatron]
    return [*common, *latent_attention_rules(f), *dense_mlp_rules(f), *expert_rules(f), *shared_expert_rules(f)]


def latent_attention_rules(f: LatentAttentionFields) -> list[Rule]:
    """Projections through a low rank, as in megatron/core/transformer/multi_latent_attention.py.

    Heads are stacked along the rows in the same order on both sides, without any interleaving.
    """
    attention, hf = "decoder.layers.{layer}.self_attention.", "model.layers.{layer}.self_attn."
    h, heads = f.hidden_size, f.num_attention_heads
    q_rows, kv_rows = heads * f.head_dim, heads * (f.qk_nope_head_dim + f.v_head_dim)

    def rule(megatron: str, name: str, *shape: int, dim: int | None) -> Rule:
        return Rule(f"{attention}{megatron}.weight", (f"{hf}{name}.weight",), (shape,), dim=dim)

    if f.q_lora_rank is None:
        queries = [rule("linear_q_proj", "q_proj", q_rows, h, dim=0)]
    else:
        queries = [
            rule("linear_q_down_proj", "q_a_proj", f.q_lora_rank, h, dim=0),
            rule("q_layernorm", "q_a_layernorm", f.q_lora_rank, dim=None),
            rule("linear_q_up_proj", "q_b_proj", q_rows, f.q_lora_rank, dim=0),
        ]
    return [
        *queries,
        rule("linear_kv_down_proj", "kv_a_proj_with_mqa", f.kv_lora_rank + f.qk_rope_head_dim, h, dim=0),
        rule("kv_layernorm", "kv_a_layernorm", f.kv_lora_rank, dim=None),
        rule("linear_kv_up_proj", "kv_b_proj", kv_rows, f.kv_lora_rank, dim=0),
        rule("linear_proj", "o_proj", h, heads * f.v_head_dim, dim=1),
    ]


FAMILY = Family("deepseek_v3", fields, rules)
KIMI_K2 = Family("kimi_k2", fields, rules)
