"""What the gradients of a MoE model's experts say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def expert_spread(norms: Sequence[Tensor]) -> list[float | None] | None:
    """Largest over median of the gradient norms of a layer's experts, mean over the optimizer steps that have one.

    About 1 to 3 if experts learn alike; large if one learns alone; infinite where more than half of the experts got no
    gradient at all.

    Args:
        norms: of each optimizer step [MoE layers, experts], gradient norm of all weights of an expert, before clipping.

    Returns:
        [MoE layers], None for a layer whose experts all got no gradient; None without a step or without MoE layers.
    """
    if not norms or not norms[0].numel():
        return None
    values = np.stack([x.cpu().numpy() for x in norms])  # [steps, layers, experts]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values.max(2) / np.median(values, axis=2)
    return [float(x[~np.isnan(x)].mean()) if not np.isnan(x).all() else None for x in ratios.T]


def largest(values: Sequence[float | None] | None) -> float | None:
    """The largest that was measured."""
    return max((x for x in values or [] if x is not None), default=None)
