"""gpt-oss: attention sinks, every second layer with a sliding window, biases everywhere, a clamped activation.

On disk all experts of a layer are one tensor, transposed, with rows of gate and up projection in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.families.base import (
    ConfigReader,
    Family,
    ModelFields,
    attention_and_norm_rules,
)
from gspo_megatron.weights.rules import Copy, Rule, piece

ACTIVATION_ALPHA = 1.702  # of Megatron's quick_gelu


@dataclass(frozen=True)
class Transposed(Copy):
    """[E, in, out] on disk, [E, out, in] in Megatron."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].transpose(1, 2).contiguous()

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        piece(targets[0], dim, index, count).transpose(1, 2).copy_(shard)


@dataclass(frozen=True)
class GateUpInTurn(Copy):
    """[E, in, 2F] (or [E, 2F], a bias) on disk, gate and up in turn; [E, 2F, in] in Megatron, gate before up."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = self._rows(tensors[0])
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)

    def place(self, shard: Tensor, dim: int | None, index: int, count: int, targets: Sequence[Tensor]) -> None:
        rows = self._rows(piece(targets[0], dim, index, count))
        gate, up = shard.chunk(2, 1)
        rows[:, 0::2].copy_(gate)
        rows[:, 1::2].copy_(up)

    @staticmethod
    def _rows(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor


def fields(config: dict[str, Any]) -> ModelFields:
    """Fields of a GptOssForCausalLM config."""
    read = ConfigReader(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UserError(
            f"config.json: quantization_config of quant_method={method!r} is not supported: weights must be "
            "floating-point; load the model with transformers as bfloat16 and save it"
        )
    read.refuse_unless("hidden_act", ["silu"], "only the clamped SwiGLU is implemented")
    read.refuse_unless("attention_bias", [True], "this family's attention has biases")
    read.refuse_unless("swiglu_alpha", [ACTIVATION_ALPHA], "the activation is Megatron-Core's quick_gelu")
    num_layers, heads = read("num_hidden_layers"), read("num_attention_heads")
    rope = read.rope()
    return ModelFields(
        num_layers=num_layers,
        hidden_size=read("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=read("num_key_value_heads"),
        head_dim=read.optional("head_dim", 64),
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        norm_eps=read.optional("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta") or read("rope_theta")),
        tied_embeddings=read.optional("tie_word_embeddings", False),
        initializer_range=read.optional("initializer_range", 0.02),
        qk_layernorm=False,
        qkv_bias=True,
        yarn=read.yarn(),
        attention_sinks=True,
        attention_windows=_windows(config, num_layers),
        num_experts=read("num_local_experts", "num_experts"),
        experts_per_token=read.experts_per_token(renormalised=True),
        expert_ffn_hidden_size=read("intermediate_size"),
        moe_layers=tuple(range(num_layers)),
        biases=True,
        swiglu_limit=float(read.optional("swiglu_limit", 7.0)),
        stacked_experts=True,
    )


def _windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Of each layer; transformers' default is every second layer, from the first on."""
    kinds = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    window = config.get("sliding_window", 128)
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: layer_types={kinds!r} must name full_attention or sliding_attention for each of "
            f"{num_layers} layers"
        )
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        raise UserError(f"config.json: sliding_window={window!r} must be a positive integer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rules(f: ModelFields) -> list[Rule]:
    """The rule table."""
    attention, hf_attention = "decoder.layers.{layer}.self_attention.", "model.layers.{layer}.self_attn."
    router, hf_router = "decoder.layers.{layer}.mlp.router.", "model.layers.{layer}.mlp.router."
    experts, hf_experts = "decoder.layers.{layer}.mlp.experts.", "model.layers.{layer}.mlp.experts."
    count, ffn, h = f.num_experts, f.expert_ffn_hidden_size, f.hidden_size
    assert count is not None

    def stacked(megatron: str, name: str, shape: tuple[int, ...], codec: Copy) -> Rule:
        return Rule(experts + megatron, (hf_experts + name,), (shape,), codec, dim=0, stacks_experts=True)

    return [
        *attention_and_norm_rules(f),
        Rule(attention + "linear_proj.bias", (hf_attention + "o_proj.bias",), ((h,),)),
        Rule(
            attention + "core_attention.softmax_offset", (hf_attention + "sinks",), ((f.num_attention_heads,),), dim=0
        ),
        Rule(router + "weight", (hf_router + "weight",), ((count, h),)),
        Rule(router + "bias", (hf_router + "bias",), ((count,),)),
        stacked("weight1", "gate_up_proj", (count, h, 2 * ffn), GateUpInTurn()),
        stacked("bias1", "gate_up_proj_bias", (count, 2 * ffn), GateUpInTurn()),
        stacked("weight2", "down_proj", (count, ffn, h), Transposed()),
        stacked("bias2", "down_proj_bias", (count, h), Copy()),
    ]


FAMILY = Family("gpt_oss", fields, rules)
