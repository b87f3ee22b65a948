"""What a family file gives: plain fields of the model and its rule table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.errors import UserError
from gspo_megatron.weights.rules import QKV, GateUp, Rule, TensorSpec, Vocabulary, expand


@dataclass(frozen=True)
class ModelFields:
    """A decoder-only transformer in plain numbers; policy/model.py makes Megatron's config of it."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int  # of dense layers
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    initializer_range: float
    qk_layernorm: bool
    num_experts: int | None = None
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    moe_layers: tuple[int, ...] = ()  # layers with experts
    router_pre_softmax: bool = False  # softmax before (True) or after top-k

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.moe_layers)


@dataclass(frozen=True)
class Family:
    """One model family: from its HF config to fields, from fields to rules."""

    model_type: str
    fields: Callable[[dict[str, Any]], ModelFields]
    rules: Callable[[ModelFields], Sequence[Rule]]

    def specs(self, fields: ModelFields) -> list[TensorSpec]:
        """Every parameter of the model."""
        return expand(self.rules(fields), fields.num_layers)


class ConfigReader:
    """Reads an HF config.json, refusing what is missing or can't be expressed."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __call__(self, name: str, *older_names: str) -> Any:
        for candidate in (name, *older_names):
            if self.config.get(candidate) is not None:
                return self.config[candidate]
        raise UserError(f'config.json of a {self.config.get("model_type")} model lacks "{name}"')

    def refuse_unless(self, name: str, allowed: Sequence[Any], reason: str) -> None:
        value = self.config.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"config.json: {name}={value!r} is not supported: {reason}")

    def rope_theta(self) -> float:
        """From `rope_parameters` (transformers 5), `rope_scaling` or `rope_theta`; scaled variants are refused."""
        # Where both are given, transformers lets the older name go first: that is where users add scaling.
        parameters = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json: rope_type={kind!r} is not supported; only unscaled rotary embeddings are")
        return float(parameters.get("rope_theta") or self("rope_theta"))


def attention_and_norm_rules(f: ModelFields) -> list[Rule]:
    """Embedding, attention, norms and head: the same in all Llama-like families."""
    attention = "decoder.layers.{layer}.self_attention."
    hf_attention = "model.layers.{layer}.self_attn."
    q_rows, kv_rows = f.num_attention_heads * f.head_dim, f.num_query_groups * f.head_dim
    h = f.hidden_size
    vocabulary = Vocabulary(f.vocab_size)
    rules = [
        Rule(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((f.vocab_size, h),), vocabulary, dim=0
        ),
        Rule(
            "decoder.layers.{layer}.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), ((h,),)
        ),
        Rule(
            attention + "linear_qkv.weight",
            tuple(f"{hf_attention}{x}_proj.weight" for x in "qkv"),
            ((q_rows, h), (kv_rows, h), (kv_rows, h)),
            QKV(f.num_query_groups, f.num_attention_heads // f.num_query_groups, f.head_dim),
            dim=0,
        ),
        Rule(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), ((h, q_rows),), dim=1),
    ]
    if f.qk_layernorm:
        rules += [
            Rule(f"{attention}{x}_layernorm.weight", (f"{hf_attention}{x}_norm.weight",), ((f.head_dim,),))
            for x in "qk"
        ]
    rules += [
        Rule(
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            ((h,),),
        ),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),)),
    ]
    # A tied model's last pipeline stage holds its own copy of the embedding: loaded, never exported.
    head = "model.embed_tokens.weight" if f.tied_embeddings else "lm_head.weight"
    shape = ((f.vocab_size, h),)
    rules.append(Rule("output_layer.weight", (head,), shape, vocabulary, dim=0, load_only=f.tied_embeddings))
    return rules


def dense_mlp_rules(f: ModelFields) -> list[Rule]:
    """Gated MLP of the layers without experts."""
    if not f.dense_layers:
        return []
    mlp, hf_mlp = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    ffn, h = f.ffn_hidden_size, f.hidden_size
    gate_up = tuple(f"{hf_mlp}{x}_proj.weight" for x in ("gate", "up"))
    return [
        Rule(mlp + "linear_fc1.weight", gate_up, ((ffn, h), (ffn, h)), GateUp(), dim=0, layers=f.dense_layers),
        Rule(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), ((h, ffn),), dim=1, layers=f.dense_layers),
    ]


def expert_rules(f: ModelFields) -> list[Rule]:
    """Router and experts, named per expert as published checkpoints do."""
    mlp, hf_mlp = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    expert, hf_expert = mlp + "experts.local_experts.{expert}.", hf_mlp + "experts.{expert}."
    ffn, h = f.expert_ffn_hidden_size, f.hidden_size
    assert f.num_experts is not None
    gate_up = tuple(f"{hf_expert}{x}_proj.weight" for x in ("gate", "up"))
    layers, count = f.moe_layers, f.num_experts
    fc1, fc2 = expert + "linear_fc1.weight", expert + "linear_fc2.weight"
    down = (hf_expert + "down_proj.weight",)
    return [
        Rule(mlp + "router.weight", (hf_mlp + "gate.weight",), ((count, h),), layers=layers),
        Rule(fc1, gate_up, ((ffn, h), (ffn, h)), GateUp(), dim=0, layers=layers, num_experts=count),
        Rule(fc2, down, ((h, ffn),), dim=1, layers=layers, num_experts=count),
    ]
