"""A checkpoint's tensors, put together by torch's own classes rather than by ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, whole."""
    state: dict[str, torch.Tensor] = {}
    _load_state_dict(state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not bitwise equal in two checkpoints; rows of padding count only if not zero."""
    a, b = read_tensors(one), read_tensors(other)
    assert a, f"{one} holds no tensor"
    return sorted(a.keys() ^ b.keys()) + sorted(name for name in a.keys() & b.keys() if not _same(a[name], b[name]))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
        return False
    rows = min(len(a), len(b)) if a.dim() else 0
    if a.dim() and (a[rows:].any() or b[rows:].any()):
        return False
    x, y = (a[:rows], b[:rows]) if a.dim() else (a, b)
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
