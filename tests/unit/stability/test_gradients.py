from __future__ import annotations

import math

import pytest
import torch

from gspo_megatron.stability.gradients import expert_spread, largest


@pytest.mark.filterwarnings("error")
def test_spread_of_hand_made_norms() -> None:
    first = torch.tensor([[1.0, 2.0, 3.0, 10.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    second = torch.tensor([[2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    spread = expert_spread([first, second])
    assert spread is not None
    assert spread[:2] == [pytest.approx((10 / 2.5 + 1) / 2), pytest.approx(4 / 2.5)]
    assert spread[2] == math.inf, "more than half got no gradient"
    assert expert_spread([first])[1] is None  # type: ignore[index]
    assert largest(spread[:2]) == spread[0]


def test_nothing_measured() -> None:
    assert expert_spread([]) is None
    assert expert_spread([torch.zeros(0, 0)]) is None, "a dense model"
    assert largest(None) is largest([None]) is None
