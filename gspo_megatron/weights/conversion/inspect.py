"""What a folder of either format holds, from its headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.weights.conversion.models import HFModel, open_model


@dataclass(frozen=True)
class TensorLine:
    """One tensor as it is stored: under its own key in torch_dist, by its own name in a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: int  # entries it is stored in


@dataclass(frozen=True)
class Inspection:
    """Of one folder."""

    folder: str
    format: str  # "hf" or "torch_dist"
    family: str
    step: int | None  # None: the format has no such thing
    layout: dict[str, int]  # degrees it was saved under
    contains: tuple[str, ...]
    nbytes: int  # of the tensors
    tensors: tuple[TensorLine, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """For people."""
        degrees = ", ".join(f"{k} {v}" for k, v in self.layout.items() if v != 1) or "none"
        lines = [
            f"{self.folder}: {self.format}, {self.family}, {len(self.tensors)} tensors, {self.nbytes / 1e9:.3f} GB",
        ]
        if self.format == "torch_dist":
            lines.append(
                f"step {self.step}, contains {', '.join(self.contains)}, saved under parallel degrees: {degrees}"
            )
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        lines += [
            f"  {t.name:<{width}}  {t.dtype:<9} {list(t.shape)}" + (f" in {t.parts} parts" if t.parts > 1 else "")
            for t in self.tensors
        ]
        return "\n".join(lines)


def inspect(folder: Path) -> Inspection:
    """Reads no tensor. Raises UserError where the folder is damaged."""
    model = open_model(folder)
    if isinstance(model, HFModel):
        checkpoint = model.checkpoint
        lines = [
            TensorLine(n, checkpoint.shape(n), _short(checkpoint.stored_dtype(n)), 1)
            for n in sorted(checkpoint.file_of)
        ]
        return _made(folder, "hf", model.architecture.family.model_type, None, {}, ("model",), lines)
    stored = model.checkpoint.tensors
    lines = [TensorLine(key, t.shape, _short(t.dtype), len(t.chunks)) for key, t in sorted(stored.items())]
    about = model.description
    return _made(folder, "torch_dist", about.family, about.step, dict(about.layout), about.contains, lines)


def _made(
    folder: Path,
    kind: str,
    family: str,
    step: int | None,
    layout: dict[str, int],
    contains: Any,
    lines: list[TensorLine],
) -> Inspection:
    nbytes = sum(math.prod(line.shape) * getattr(torch, line.dtype).itemsize for line in lines)
    return Inspection(str(folder), kind, family, step, layout, tuple(contains), nbytes, tuple(lines))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
