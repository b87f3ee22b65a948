"""What a conversion would do, in words: --dry-run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.weights.conversion.to_hf import ToHF
from gspo_megatron.weights.conversion.to_megatron import ToMegatron

_IMPORTS_BYTES = 0.35e9  # resident memory of this program before it reads a tensor


def describe_plan(
    conversion: ToMegatron | ToHF, target: Path, left_out: Sequence[str], *, threads: int, every_file: bool = False
) -> str:
    """Files, tensors, bytes and memory. `every_file`: each file in a line of its own."""
    files = conversion.files
    total = sum(file.nbytes for file in files)
    threads = min(threads, len(files))
    memory = _IMPORTS_BYTES + threads * conversion.memory_bytes
    lines = [
        f"{conversion.source} -> {target}: {len(conversion.model.names)} tensors, {total / 1e9:.3f} GB "
        f"in {len(files)} files, {conversion.dtypes}; "
        f"{threads} at a time in at most about {memory / 1e9:.2f} GB of memory"
    ]
    if left_out:
        lines.append(
            f"left out, for no rule has a place for them: {len(left_out)} tensors ({left_out[0]} … {left_out[-1]})"
        )
    if behind := conversion.left_behind:
        more = f" and {len(behind) - 8} more" * (len(behind) > 8)
        lines.append(
            f"left behind, for they are no weights that are read nor small files: {', '.join(behind[:8])}{more}"
        )
    if every_file:
        lines += [f"  {file.name:<36} {file.nbytes:>15,} bytes" for file in files]
    return "\n".join(lines)
