"""Tiny random models of every family, in which each kind of weight matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 131

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
SIGMOID: dict[str, Any] = {"norm_topk_prob": True, "routed_scaling_factor": 1.7, "moe_intermediate_size": 24}

# Configurations by model_type, and a second one where the family has a switch that changes the computation.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": SIGMOID
    | {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "olmoe": {"intermediate_size": 24, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,  # many positions lie beyond it
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CONFIGS["deepseek_v3"] = SIGMOID | {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_parameters": YARN,
}
CONFIGS["gpt_oss"] = {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"truncate": False},
    "swiglu_limit": 0.7,  # reached by many
}
CLASSES = {
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}


def make(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with weights, biases, norms and selection biases that are all felt."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, CLASSES[family])(make_config(family, **changes))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in _weights(model):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else _scale(name) * noise)
    return model.float().eval()


def make_config(family: str, **changes: Any) -> PretrainedConfig:
    """transformers' configuration of the model."""
    config: PretrainedConfig = getattr(transformers, CLASSES[family]).config_class(
        **(COMMON | CONFIGS[family] | changes)
    )
    config._attn_implementation = "eager"
    return config


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))


def _scale(name: str) -> float:
    if name.endswith(("mlp.gate.weight", "router.weight")):
        return 0.3  # routes that are far from ties
    if name.endswith("sinks"):
        return 1.0
    return 0.2 if name.endswith("bias") else 0.1


def gradients(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The gradients of a model's parameters under the names of a checkpoint; `folder` is written to.

    transformers stacks experts in memory: its own writer names them one by one.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
