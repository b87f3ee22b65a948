"""Model families by the `model_type` of their config.json. A new family is one file and one line here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError, nearest
from gspo_megatron.weights.families import deepseek_v3, glm4_moe, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3, qwen3_moe
from gspo_megatron.weights.families.base import Family, ModelFields
from gspo_megatron.weights.families.config_types import check_fields, check_types
from gspo_megatron.weights.torch_dist.description import DESCRIPTION

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        deepseek_v3.FAMILY,
        glm4_moe.FAMILY,
        gpt_oss.FAMILY,
        mixtral.FAMILY,
        olmoe.FAMILY,
        qwen2_moe.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
    )
}

# Families whose tensors can be planned for: the trained ones, and one that can't be compared with transformers.
PLANNABLE: dict[str, Family] = FAMILIES | {deepseek_v3.KIMI_K2.model_type: deepseek_v3.KIMI_K2}

# Families that people ask for and that can't be had, and why.
REFUSED: dict[str, str] = {
    "kimi_k2": 'transformers does not know it; it is DeepSeek-V3 by another name: write "deepseek_v3" there',
    "qwen3_next": "its linear-attention layers carry a state over the ends of packed sequences and of context-parallel "
    "ranks, and Megatron-Core has them with Transformer Engine only",
}

# What reading numbers that fit no model may raise.
IMPOSSIBLE = (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError, AssertionError)


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"model.path={folder} is no folder; give a Hugging Face model folder")
    if not path.is_file() and (Path(folder) / DESCRIPTION).is_file():
        raise UserError(
            f"{path} is missing; model.path must be a Hugging Face model folder, and {folder} is a checkpoint of "
            f"Megatron's ({DESCRIPTION} is there): make such a folder of it with "
            f"`tools/convert_checkpoint.py export {folder} OUT_DIR`"
        )
    if not path.is_file():
        raise UserError(f"{path} is missing; model.path must be a Hugging Face model folder with config.json")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    check_types(config, path)
    return config


def find_family(config: dict[str, Any]) -> Family:
    """The family of an HF config, by its exact model_type."""
    model_type = str(config.get("model_type"))
    if model_type in REFUSED:
        raise UserError(f'config.json: model_type="{model_type}" is not supported: {REFUSED[model_type]}')
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f'model_type "{model_type}" is not supported (known: {known}).{nearest(model_type, FAMILIES)}')
    return FAMILIES[model_type]


def read_fields(config: dict[str, Any], path: Path) -> tuple[Family, ModelFields]:
    """Family and fields of a config from `path`, whose numbers describe a possible model.

    Raises:
        UserError: the family is not supported, or a value is missing, not supported or not possible.
    """
    family = find_family(config)
    try:
        fields = family.fields(config)
    except UserError:
        raise
    except IMPOSSIBLE as error:
        raise UserError(f"{path} describes no possible model: {type(error).__name__}: {error}") from error
    check_fields(fields, path)
    return family, fields


def load_fields(folder: str | Path) -> tuple[Family, ModelFields]:
    """Family and fields of a model folder; see `read_hf_config` and `read_fields` for what is refused."""
    return read_fields(read_hf_config(folder), Path(folder) / "config.json")
