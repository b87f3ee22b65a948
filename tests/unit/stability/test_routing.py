"""Counts of routes against hand-made ones."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.metrics import LIST_METRICS, METRICS
from gspo_megatron.stability.routing import count_routes, route_metrics, sets_differ
from gspo_megatron.types import RecordedRoutes

CPU = torch.device("cpu")


def recorded(
    experts: list[Any], real: list[bool], layers: tuple[int, ...] = (0,), num_experts: int = 4
) -> RecordedRoutes:
    chosen = torch.tensor(experts, dtype=torch.int16)  # [T, layers, k]
    load = torch.zeros(len(layers), num_experts, dtype=torch.int64)
    for row, is_real in zip(experts, real, strict=True):
        for place, pair in enumerate(row):
            load[place, pair] += is_real
    entropy = torch.full((len(layers),), 0.5 * sum(real), dtype=torch.float64)
    return RecordedRoutes(layers, 0, torch.tensor(real), chosen, entropy, load)


def counted(before: list[Any], after: list[Any], real: list[bool], engine: Tensor | None = None, **more: Any) -> Tensor:
    valid = more.pop("valid", None)
    micro: Any = SimpleNamespace(recorded=recorded(before, real, **more), routes=engine, routes_valid=valid)
    layers = more.get("layers", (0,))
    return count_routes([micro], [recorded(after, real, **more)], num_layers=max(layers) + 1, num_experts=4, device=CPU)


def test_a_set_has_no_order() -> None:
    differ = sets_differ(torch.tensor([[0, 1], [2, 3], [0, 1]]), torch.tensor([[1, 0], [2, 1], [0, 1]]))
    assert differ.tolist() == [False, True, False]


def test_hand_made_counts() -> None:
    before = [[[0, 1]], [[2, 1]], [[0, 1]], [[0, 1]]]
    after = [[[1, 0]], [[2, 0]], [[0, 2]], [[2, 3]]]
    engine = torch.tensor([[[0, 1]], [[1, 0]], [[9, 9]], [[0, 3]]], dtype=torch.int16)
    counts = counted(before, after, [True, True, True, False], engine, valid=torch.tensor([True, True, False, True]))
    row = route_metrics(counts)
    assert row["expert_change_fraction"] == pytest.approx(2 / 3), "the last token is padding"
    assert row["expert_mismatch_fraction"] == pytest.approx(1 / 2), "the third has no route, the last is padding"
    assert row["router_entropy"] == pytest.approx(0.5)
    assert row["expert_load_max"] == pytest.approx(3 / 1.5) and row["dead_experts"] == 1
    assert row["dead_experts_layers"] == [1]
    assert row.keys() <= METRICS.keys()
    assert {key for key, value in row.items() if isinstance(value, list)} <= LIST_METRICS


def test_stages_and_ranks_add_up() -> None:
    """Two ranks hold a layer each; the third holds none."""
    one = counted([[[0, 1]]], [[[0, 2]]], [True], layers=(0,))
    other = counted([[[2, 3]]], [[[2, 3]]], [True], layers=(1,))
    total = torch.cat([one, torch.zeros(1, one.shape[1])]) + other
    row = route_metrics(total)
    assert row["expert_change_fraction_layers"] == [1.0, 0.0]
    assert row["expert_change_fraction"] == 0.5
    assert row["expert_mismatch_fraction"] is row["expert_mismatch_fraction_layers"] is None, "no engine's routes"


def test_nothing_counted_is_none() -> None:
    row = route_metrics(torch.zeros(2, 9, dtype=torch.float64))
    assert set(row.values()) == {None}
    assert set(route_metrics(torch.zeros(0, 5, dtype=torch.float64)).values()) == {None}
    assert not any(isinstance(x, float) and math.isnan(x) for x in row.values())
