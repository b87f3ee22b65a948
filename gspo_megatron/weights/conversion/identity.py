"""What a conversion's bytes depend on, as one word: a killed one is taken up only by its like."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import xxhash

from gspo_megatron.weights.conversion.execute import OutputFile

_VERSION = 1  # of the bytes that are written for the same source and plan


def identity_of(
    source: Path, source_files: Iterable[str], files: Sequence[OutputFile], dtype: torch.dtype | None
) -> str:
    """Of the source's files by name, size and time, and of the plan."""
    stats = {name: (source / name).stat() for name in sorted({*source_files, *_small_files(source)})}
    content = {
        "version": _VERSION,
        "source": str(source.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "plan": [[file.name, file.nbytes] for file in files],
        "dtype": str(dtype),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _small_files(source: Path) -> list[str]:
    return [p.relative_to(source).as_posix() for pattern in ("*.json", "hf/*.json") for p in source.glob(pattern)]


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """Each once, as they are called."""
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
