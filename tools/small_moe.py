"""What the benchmarks of one rank train: a random Qwen3-MoE, and ragged sequences of random tokens."""

from __future__ import annotations

import math

import torch

from gspo_megatron.types import Sequence

MODEL = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def ragged_sequences(tokens: int, *, longest: int, generator: torch.Generator, first: int = 0) -> list[Sequence]:
    """`tokens` tokens in sequences of `longest` / 4 to `longest`, of which the first quarter is the prompt; numbered
    from `first`. The rollout engine is one that gives every token of the vocabulary the same probability."""
    sequences: list[Sequence] = []
    vocabulary = int(MODEL["vocab_size"])  # type: ignore[call-overload]
    left = tokens
    while left > 0:
        length = min(left, int(torch.randint(longest // 4, longest + 1, (), generator=generator)))
        token_ids = torch.randint(2, vocabulary, (length,), generator=generator)
        mask = torch.arange(length) >= length // 4
        logprobs = torch.full((length,), -math.log(vocabulary))
        advantage = torch.randn((), generator=generator)
        sequences.append(Sequence(first + len(sequences), token_ids, mask, logprobs, advantage))
        left -= length
    return sequences
