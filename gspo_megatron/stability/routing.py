"""What a MoE model's routers chose, and how that changed.

A token's expert set in a layer is the set of the k experts it is sent to, whatever their order and gates. Counted are
real tokens, prompt and response, once each; the shares are over (token, layer) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.types import MicroBatch, RecordedRoutes

# Columns of the counts of a layer; the tokens that each expert got follow.
TOKENS, CHANGED, ENGINE_TOKENS, ENGINE_CHANGED, ENTROPY, FIRST_EXPERT = range(6)


def sets_differ(experts: Tensor, others: Tensor) -> Tensor:
    """[..., k] and [..., k] expert numbers -> [...] bool: not the same set."""
    return (experts.sort(-1).values != others.sort(-1).values).any(-1)


def count_routes(
    micro_batches: Iterable[MicroBatch],
    after: Iterable[RecordedRoutes],
    *,
    num_layers: int,
    num_experts: int,
    device: torch.device,
) -> Tensor:
    """This rank's share of the counts, to be summed over all ranks.

    Args:
        micro_batches: with `recorded`, the routes before the updates, and with the engine's `routes` if there are any.
        after: the routes of each after the updates.
        num_layers: MoE layers of the whole model; num_experts: of each.

    Returns:
        [MoE layers, 5 + experts] float64.
    """
    counts = torch.zeros(num_layers, FIRST_EXPERT + num_experts, dtype=torch.float64, device=device)
    for micro, now in zip(micro_batches, after, strict=True):
        before = micro.recorded
        assert before is not None, "the routes before the updates were not recorded"
        if not before.layers:
            continue
        layers, real = torch.tensor(before.layers, device=device), before.is_real[:, None]
        columns = {
            TOKENS: before.is_real.sum().expand(len(before.layers)),
            CHANGED: (real & sets_differ(before.experts, now.experts)).sum(0),
            ENTROPY: before.entropy,
        }
        if micro.routes is not None and micro.routes_valid is not None:
            valid = real & micro.routes_valid[:, None]
            columns[ENGINE_TOKENS] = micro.routes_valid.logical_and(before.is_real).sum().expand(len(before.layers))
            columns[ENGINE_CHANGED] = (valid & sets_differ(before.experts, micro.routes)).sum(0)
        for column, values in columns.items():
            counts[layers, column] += values
        counts[layers, FIRST_EXPERT:] += before.load
    return counts


def route_metrics(counts: Tensor) -> dict[str, Any]:
    """The metrics of the counts of all ranks; None where nothing was counted.

    expert_change_fraction: share of the (token, layer) expert sets that differ before and after the updates of the
        rollout batch, on the same tokens. expert_mismatch_fraction: that differ between the rollout engine and the
        trainer before the updates, where the engine gave routes.
    router_entropy: of the experts' shares of a token's scores, in nats; log E if all are alike.
    expert_load_max: tokens of the fullest expert over the mean; 1 is balanced, E/k if all tokens choose the same.
    dead_experts: experts that got no token.

    Each as a list by MoE layer, under `…_layers`, and as one figure: the shares and the entropy over all layers, the
    load's largest, the dead experts' sum.
    """
    tokens, load = counts[:, TOKENS], counts[:, FIRST_EXPERT:]
    values = {
        "expert_change_fraction": (counts[:, CHANGED], tokens),
        "expert_mismatch_fraction": (counts[:, ENGINE_CHANGED], counts[:, ENGINE_TOKENS]),
        "router_entropy": (counts[:, ENTROPY], tokens),
    }
    row: dict[str, Any] = {}
    for key, (part, whole) in values.items():
        row[key] = float(part.sum() / whole.sum()) if whole.sum() > 0 else None
        row[f"{key}_layers"] = (part / whole).tolist() if bool((whole > 0).all()) and whole.numel() else None
    if not counts.numel() or not bool((tokens > 0).all()):
        return row
    fullest, dead = load.amax(1) / load.mean(1), (load == 0).sum(1)
    return row | {
        "expert_load_max": float(fullest.max()),
        "expert_load_max_layers": fullest.tolist(),
        "dead_experts": int(dead.sum()),
        "dead_experts_layers": dead.tolist(),
    }
