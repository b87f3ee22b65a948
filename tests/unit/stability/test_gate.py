"""The model of what mismatch clips, against simulation and against what the gate makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from gspo_megatron.stability.gate import clipped_by_mismatch, largest_kl

PAPER = {"clip_low": 3e-4, "clip_high": 4e-4}


@pytest.mark.parametrize("kl", [3e-5, 1e-4, 3e-4, 1.5e-3])
def test_the_model_is_what_a_simulation_of_tokens_clips(kl: float) -> None:
    """4,096 tokens a response, each with a log ratio of variance 2·KL and mean -KL."""
    generator = np.random.default_rng(0)
    log_s = np.array([generator.normal(-kl, np.sqrt(2 * kl), 4096).mean() for _ in range(4000)])
    positive, negative = clipped_by_mismatch(kl, tokens=4096, **PAPER)
    assert positive == pytest.approx(np.mean(log_s > np.log1p(4e-4)), abs=0.02)
    assert negative == pytest.approx(np.mean(log_s < np.log1p(-3e-4)), abs=0.02)


def test_figures_at_the_papers_clip() -> None:
    shares = {kl: clipped_by_mismatch(kl, tokens=4096, **PAPER)[1] for kl in (3e-5, 1e-4, 3e-4, 1.5e-3)}
    assert {kl: round(x, 2) for kl, x in shares.items()} == {3e-5: 0.01, 1e-4: 0.18, 3e-4: 0.5, 1.5e-3: 0.92}
    assert clipped_by_mismatch(1.5e-3, tokens=4096, **PAPER)[0] < 0.02
    assert clipped_by_mismatch(0.0, tokens=4096, **PAPER) == (0.0, 0.0)
    assert largest_kl(3e-4, 4096) == pytest.approx(4.8e-5, rel=0.02)


@pytest.mark.parametrize("clip_low", [3e-4, 0.03, 0.2])
@pytest.mark.parametrize("tokens", [1, 8.5, 256, 4096, 1e9])
def test_the_largest_kl_clips_the_share_that_is_borne(clip_low: float, tokens: float) -> None:
    kl = largest_kl(clip_low, tokens)
    assert clipped_by_mismatch(kl, clip_low=clip_low, clip_high=0.3, tokens=tokens)[1] == pytest.approx(0.05, abs=1e-6)
    assert 0 < kl <= -np.log1p(-clip_low)
