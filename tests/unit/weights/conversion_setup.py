"""Small models in both formats for the tests of conversion, written fast: no model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gspo_megatron.weights.conversion.execute import execute
from gspo_megatron.weights.conversion.models import HFModel, TorchDistModel, open_model
from gspo_megatron.weights.conversion.to_hf import ToHF
from gspo_megatron.weights.conversion.to_megatron import ToMegatron
from gspo_megatron.weights.families import find_family

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
DENSE = {k: v for k, v in CONFIG.items() if "expert" not in k and not k.startswith(("moe", "norm_topk"))} | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
}


class Silent:
    """Nobody is told how far it is; notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.nbytes = 0

    def advance(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def note(self, text: str) -> None:
        self.notes.append(text)


def write_hf(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    files: int = 1,
    seed: int = 0,
) -> Path:
    """A Hugging Face folder as transformers writes it, with random weights."""
    config = config or CONFIG
    family = find_family(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(spec.dtype or dtype)
        for spec in family.specs(family.fields(config))
        if not spec.load_only
        for name, shape in zip(spec.hf, spec.hf_shapes, strict=True)
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text("{}")
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i * len(names) // files : (i + 1) * len(names) // files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def to_megatron(source: Path, target: Path, **options: Any) -> Path:
    """Import."""
    model = open_model(source)
    assert isinstance(model, HFModel)
    execute(ToMegatron(model, **options), target, report=Silent())
    return target


def to_hf(source: Path, target: Path, **options: Any) -> Path:
    """Export."""
    model = open_model(source)
    assert isinstance(model, TorchDistModel)
    execute(ToHF(model, **options), target, report=Silent())
    return target


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
