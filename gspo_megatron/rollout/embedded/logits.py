"""Logits of a Hugging Face folder by transformers, to compare them with another implementation's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@torch.no_grad()
def transformers_logits(folder: Path, token_ids: Tensor) -> Tensor:
    """[B, L, vocabulary] in float32 of token_ids [B, L]; the weights are read by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    logits: Tensor = model.eval()(input_ids=token_ids).logits
    return logits.float()
