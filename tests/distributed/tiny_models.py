"""Tiny random models as Hugging Face folders, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_megatron.types import Sequence

VOCAB = 131  # prime: the padded vocabulary differs from it in every tensor-parallel layout


def _common() -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def make(kind: str, seed: int = 0) -> PreTrainedModel:
    """`moe`, `mixed` (dense and MoE layers, softmax before top-k, tied), `dense` or `tied` (dense too).

    float32, weights large enough that experts and attention matter.
    """
    torch.manual_seed(seed)
    if kind in ("moe", "mixed"):
        moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": kind == "moe"}
        dense = {"mlp_only_layers": [1, 2]} if kind == "mixed" else {}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_common(), **moe, **dense, tie_word_embeddings=kind == "mixed"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**_common(), tie_word_embeddings=kind == "tied"))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    return model.eval()


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save a tiny model; returns its folder."""
    make(kind, seed).save_pretrained(folder)
    return folder


def make_sequences(lengths: list[int], vocab: int, seed: int) -> list[Sequence]:
    """Random tokens; the first third of each sequence is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(2, vocab, (length,), generator=generator)
        mask = torch.arange(length) >= max(1, length // 3)
        logprobs = -3 + 0.1 * torch.randn(length, generator=generator)
        advantage = torch.randn((), generator=generator)
        sequences.append(Sequence(index, tokens, mask, logprobs, advantage))
    return sequences
