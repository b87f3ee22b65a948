from __future__ import annotations

import math

import pytest
import torch

from gspo_megatron.stability.divergence import agreement, agreement_sums, divergence_sums, k1, k3


def test_estimators_are_unbiased() -> None:
    """Over all tokens of two distributions, weighted by the first, both give the exact divergence."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    d = (q / p).log()
    assert float((p * k1(d)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p * k3(d)).sum()) == pytest.approx(exact, rel=1e-12)
    assert bool((k3(d) >= 0).all())


@pytest.mark.parametrize("outside", [0.0, math.nan, -math.inf])
def test_sums_over_response_tokens(outside: float) -> None:
    engine, old, new = torch.tensor([[-1.0, -2.0, -3.0], [-1.1, -1.9, -3.0], [-1.3, -1.8, -2.5]])
    mask = torch.tensor([True, True, False])
    new, old, engine = (torch.where(mask, x, outside) for x in (new, old, engine))
    sums = divergence_sums(new, old, engine, mask)
    for row, gaps in zip(sums.tolist(), ([-0.1, 0.1], [-0.2, 0.1], [-0.3, 0.2]), strict=True):
        assert row[0] == pytest.approx(-sum(gaps), abs=1e-6)
        assert row[1] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps), rel=1e-5)
    assert float(sums[2, 0]) == pytest.approx(float(sums[0, 0] + sums[1, 0]), abs=1e-12)


def test_small_gaps_keep_their_digits() -> None:
    old = torch.full((1000,), -7.0)
    new = old + 2.0**-14  # exact in float32
    gap = 2.0**-14
    sums = divergence_sums(new, old, old, torch.ones(1000, dtype=torch.bool))
    assert float(sums[1, 1]) == pytest.approx(1000 * (gap**2 / 2 + gap**3 / 6), rel=1e-8)
    assert float(sums[0].abs().sum()) == 0.0


def test_agreement() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 20, generator=generator)
    trainer = logits.log_softmax(-1)[:, 3]
    hotter = (logits / 1.3).log_softmax(-1)[:, 3]
    other = (logits + torch.randn(500, 20, generator=generator)).log_softmax(-1)[:, 3]
    mask = torch.arange(500) < 400
    for engine in (trainer, hotter, other):
        sums = agreement_sums(torch.where(mask, trainer, math.nan), engine, mask)
        correlation, slope = agreement(sums.tolist(), 400)
        x, y = trainer[:400].double(), engine[:400].double()
        assert correlation == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-9)
        assert slope == pytest.approx(float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()))
    assert agreement([0.0] * 5, 0) == agreement([-2.0, -2.0, 2.0, 2.0, 2.0], 2) == (None, None)
