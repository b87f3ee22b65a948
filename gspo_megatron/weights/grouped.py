"""Which experts torch's grouped product can hold. Pure, so that a configuration is checked before Megatron loads."""

from __future__ import annotations

import torch

ALIGNMENT_BYTES = 16  # of the rows of every matrix given to torch.nn.functional.grouped_mm


def misaligned(hidden_size: int, ffn_size_per_rank: int, dtype: torch.dtype) -> str | None:
    """Why `torch.nn.functional.grouped_mm` refuses experts of these sizes; None where it takes them.

    Args:
        hidden_size: the model's H.
        ffn_size_per_rank: an expert's intermediate size divided by the expert-tensor degree.
        dtype: of the weights.
    """
    multiple = ALIGNMENT_BYTES // dtype.itemsize
    sizes = {"hidden_size": hidden_size, "expert intermediate size per expert-tensor rank": ffn_size_per_rank}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % multiple]
    if not wrong:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"{', '.join(wrong)} must be a multiple of {multiple}: rows of {kind} must be a multiple of 16 bytes"
