"""What a checkpoint folder says of itself: gspo_megatron.json beside Megatron's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError

DESCRIPTION = "gspo_megatron.json"
HF_FOLDER = "hf"  # beside it: config.json, tokenizer … of the model
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32", "float64")
CONTENTS = ("model", "optimizer", "trainer")


@dataclass(frozen=True)
class Description:
    """Of one checkpoint."""

    family: str  # model_type of the HF config
    step: int  # rollout batches trained; 0: converted, not trained
    dtype: str  # of the model's weights, such as "bfloat16"
    contains: tuple[str, ...] = ("model",)  # of CONTENTS
    layout: Mapping[str, int] = field(default_factory=dict)  # degrees it was saved under; {}: of no process group
    format_version: int = FORMAT_VERSION


def write_description(folder: Path, description: Description) -> None:
    """Write and fsync the file."""
    with open(folder / DESCRIPTION, "w") as file:
        file.write(json.dumps(asdict(description), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_description(folder: Path) -> Description:
    """Read it. Raises UserError, naming the file, where it is missing, damaged or of a newer format."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no checkpoint of gspo_megatron")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version={version!r} is not known here; this program reads {FORMAT_VERSION}")
    known = Description.__dataclass_fields__.keys()
    if content.keys() != known:
        raise UserError(f"{path} must hold exactly {', '.join(known)}; it holds {', '.join(map(str, content))}")
    wrong = [name for name, check in _CHECKS.items() if not check(content[name])]
    if wrong:
        raise UserError(f"{path}: {', '.join(f'{name}={content[name]!r}' for name in wrong)} is not possible")
    return Description(**{**content, "contains": tuple(content["contains"])})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_CHECKS = {
    "family": lambda v: isinstance(v, str),
    "step": _is_count,
    "dtype": lambda v: v in DTYPES,
    "contains": lambda v: isinstance(v, list) and "model" in v and all(item in CONTENTS for item in v),
    "layout": lambda v: isinstance(v, dict) and all(map(_is_count, v.values())),
}
