"""Types and bounds of what a config.json may hold, before and after a family reads it: it comes from anywhere."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError
from gspo_megatron.weights.families.base import ModelFields

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "decoder_sparse_step",
    "moe_layer_freq",
    "n_group",
    "topk_group",
)  # at least 1, where given
_SIZES = (
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "q_lora_rank",
)  # 0 too
_NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "routed_scaling_factor",
    "partial_rotary_factor",
    "swiglu_limit",
)  # finite and positive
_FLAGS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_sliding_window", "qkv_bias", "use_qk_norm")
_TABLES = ("rope_parameters", "rope_scaling", "quantization_config")
_MOST = 2**31 - 1
_MOST_EXPERTS = 200_000  # of all layers together; the largest models have some ten thousand


def check_types(config: dict[str, Any], path: Path) -> None:
    """Raise UserError, naming the file and the keys, where a value is of a type or size that no model has."""
    wrong = [
        f"{name}={_short(config[name])} must be {what}"
        for names, allowed, what in _CHECKS
        for name in names
        if config.get(name) is not None and not allowed(config[name])
    ]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong[:5])}")
    experts = max(config.get(name) or 1 for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    layers = config.get("num_hidden_layers") or 1
    if layers * experts > _MOST_EXPERTS:
        raise UserError(f"{path}: num_hidden_layers={layers} × {experts} experts is more than {_MOST_EXPERTS}")


def check_fields(fields: ModelFields, path: Path) -> None:
    """Raise UserError, naming the file, where a family made fields of its numbers that no model has."""
    for item in dataclasses.fields(fields):
        value = getattr(fields, item.name)
        if str(item.type).startswith("int") and item.name not in ("experts_per_token", "expert_ffn_hidden_size"):
            if value is None and item.type == "int | None":
                continue
            if type(value) is not int or value < 1:
                raise UserError(f"{path}: {item.name}={value!r} must be a positive integer")
    if fields.num_experts is not None and not 1 <= fields.experts_per_token <= fields.num_experts:
        raise UserError(
            f"{path}: num_experts_per_tok={fields.experts_per_token} must lie between 1 and "
            f"num_experts={fields.num_experts}"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_layer_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_EXPERTS and all(map(_is_count, value))


_CHECKS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("model_type",), lambda v: isinstance(v, str), "text"),
    (_COUNTS, lambda v: _is_count(v) and v > 0, f"an integer from 1 to {_MOST}"),
    (_SIZES, _is_count, f"an integer from 0 to {_MOST}"),
    (_NUMBERS, lambda v: type(v) in (int, float) and 0 < v < math.inf, "a positive number"),
    (_FLAGS, lambda v: isinstance(v, bool), "true or false"),
    (_TABLES, lambda v: isinstance(v, dict), "an object"),
    (("mlp_only_layers",), _is_layer_list, "a list of layers"),
)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
