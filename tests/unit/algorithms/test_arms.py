"""Each comparison arm against its published formula: a float64 loop over responses, differentiated by autograd.

Nothing of the package computes the expected values. Ratios, products and powers are written as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.algorithms import Objective, build, mismatch_of, objective
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.types import MicroBatch

ARMS = ["cispo", "gmpo", "sapo", "luspo", "vespo", "minirl"]
NAN, INF = math.nan, math.inf
N = 9  # sequences of the global batch, of which the tests hold fewer
NUM_TOKENS = 61


@dataclass
class Response:
    """One sequence as a loop reads it: every tensor [L], the advantage a number."""

    mask: Tensor
    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    advantage: float

    def kept(self, values: Tensor) -> Tensor:
        return values[self.mask]


def make_responses(*, wide: bool, dtype: torch.dtype = torch.float64) -> list[Response]:
    """Ragged sequences with either sign of the advantage, some of 0, one without response tokens.

    Wide: token ratios between 0.1 and 8, on both sides of every token clip. Narrow: sequence ratios around 1 ± 2e-3.
    Outside the responses NaN and both infinities lie.
    """
    layout = [
        ("..xxxxx", 1.0, 1e-3),
        ("x", -0.7, -1e-2),
        (".xx.xxx..", -1.2, -1e-3),
        ("...", 0.9, 0.0),
        ("..xxxxxxxxxxxx", 0.6, 4e-3),
        (".xxxx", -0.5, 1e-3),
        ("xx", 0.8, -4e-3),
        (".xxx", 0.0, 5e-3),
        ("xxxxxxxxx", -0.3, 6e-3),
    ]
    generator = torch.Generator().manual_seed(7)
    responses = []
    for number, (text, advantage, shift) in enumerate(layout):
        mask = torch.tensor([c == "x" for c in text])
        old = -0.3 - 2 * torch.rand(len(text), generator=generator, dtype=torch.float64)
        noise = torch.randn(len(text), generator=generator, dtype=torch.float64)
        if wide:
            ratio = 0.5 * noise
            ratio[-1] = [2.0, -2.2][number % 2]  # an outlier in each response
        else:
            mean = (noise * mask).sum() / max(int(mask.sum()), 1)
            ratio = shift + 0.01 * (noise - mean)
        rollout = old + 0.8 * torch.randn(len(text), generator=generator, dtype=torch.float64)
        poison = torch.tensor([NAN, INF, -INF], dtype=torch.float64)[torch.arange(len(text)) % 3]
        rows = [
            torch.where(mask, x, p).to(dtype) for x, p in ((old + ratio, poison), (old, -poison), (rollout, poison))
        ]
        responses.append(Response(mask, rows[0], rows[1], rows[2], advantage))
    return responses


def pack(responses: list[Response], tail: int = 0) -> tuple[Tensor, MicroBatch]:
    """The responses end to end, and tokens of no sequence behind them."""

    def joined(name: str, fill: float) -> Tensor:
        rows = [getattr(r, name) for r in responses]
        return torch.cat([*rows, torch.full((tail,), fill).to(rows[0].dtype)])

    lengths = torch.tensor([r.mask.numel() for r in responses])
    mask = joined("mask", 1.0)
    batch = MicroBatch(
        token_ids=torch.zeros(mask.numel(), dtype=torch.long),
        targets=torch.zeros(mask.numel(), dtype=torch.long),
        positions=torch.zeros(mask.numel(), dtype=torch.long),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int(),
        sequence_ids=torch.arange(len(responses)),
        lengths=lengths,
        response_mask=mask,
        rollout_logprobs=joined("rollout", NAN),
        advantages=torch.tensor([r.advantage for r in responses], dtype=joined("old", NAN).dtype),
        max_seqlen=int(lengths.max()),
        num_padding_tokens=tail,
        old_logprobs=joined("old", NAN),
    )
    return joined("logprobs", NAN), batch


def run(config: AlgorithmConfig, logprobs: Tensor, batch: MicroBatch) -> tuple[Objective, Tensor]:
    """The objective, and its gradient [T]."""
    leaf = logprobs.clone().requires_grad_()
    result = objective(
        build(config),
        leaf,
        torch.zeros_like(logprobs),
        batch,
        num_sequences=N,
        num_tokens=NUM_TOKENS,
        mismatch=mismatch_of(config),
    )
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    return result, gradient


# -- The published formulas: J of one response, and which of its tokens count as clipped -------------------------------

Formula = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def cispo(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    ratio = (new / old).detach()
    return (ratio.clip(max=5.0) * advantage * new.log()).sum() / NUM_TOKENS, ratio > 5.0


def gmpo(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    ratio = new / old
    bounded = ratio.clip(math.exp(-0.4), math.exp(0.4))
    inner = torch.minimum(ratio * advantage, bounded * advantage).abs()
    hit = bounded * advantage < ratio * advantage
    return math.copysign(1.0, advantage) * inner.prod() ** (1 / inner.numel()) / N, hit


def sapo(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    ratio, tau = new / old, 1.0 if advantage > 0 else 1.05
    gate = 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    return (gate * advantage).mean() / N, torch.zeros_like(ratio, dtype=torch.bool)


def luspo(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    s = (new / old).prod() ** (1 / new.numel())
    bounded = s.clip(1 - 2e-3, 1 + 2.5e-3)
    hit = bounded * advantage < s * advantage
    return new.numel() * torch.minimum(s * advantage, bounded * advantage) / N, hit.expand(new.shape)


def vespo(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    weight = (new.prod() / old.prod()).detach()
    c1, c2 = (2, 3) if advantage > 0 else (3, 2)
    phi = weight**c1 * torch.exp(c2 * (1 - weight))
    return phi * advantage * new.log().sum() / N, torch.zeros_like(new, dtype=torch.bool)


def minirl(new: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    ratio = (new / old).detach()
    hit = ratio > 1.27 if advantage > 0 else ratio < 0.8
    weight = (old / rollout).clip(max=5.0) * ratio
    return (torch.where(hit, 0.0, weight) * advantage * new.log()).sum() / N, hit


FORMULAS: dict[str, Formula] = {
    "cispo": cispo,
    "gmpo": gmpo,
    "sapo": sapo,
    "luspo": luspo,
    "vespo": vespo,
    "minirl": minirl,
}


def expected(name: str, responses: list[Response]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], gradient in the packed log-probabilities [T], clipped tokens [T]."""
    loss, gradients, clipped = torch.zeros((), dtype=torch.float64), [], []
    for r in responses:
        leaf = r.kept(r.logprobs).double().requires_grad_()
        gradient, hit = torch.zeros(r.mask.numel(), dtype=torch.float64), torch.zeros_like(r.mask)
        if leaf.numel() and r.advantage != 0:
            old, rollout = r.kept(r.old).double().exp(), r.kept(r.rollout).double().exp()
            value, hit[r.mask] = FORMULAS[name](leaf.exp(), old, rollout, r.advantage)
            (gradient[r.mask],) = torch.autograd.grad(-value, leaf)
            loss = loss - value.detach()
        gradients.append(gradient)
        clipped.append(hit)
    return loss, torch.cat(gradients), torch.cat(clipped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ARMS)
def test_loss_and_gradient_are_the_published_ones(name: str, wide: bool, dtype: torch.dtype) -> None:
    responses = make_responses(wide=wide, dtype=dtype)
    loss, gradient, clipped = expected(name, responses)
    result, actual = run(AlgorithmConfig(name=name), *pack(responses))
    exact = dtype == torch.float64
    torch.testing.assert_close(result.loss, loss.to(dtype), rtol=1e-12 if exact else 1e-6, atol=0)
    torch.testing.assert_close(actual, gradient.to(dtype), rtol=1e-11 if exact else 1e-5, atol=0)
    assert torch.equal(result.stats.clipped_tokens, clipped)

    clips_here = {"luspo": not wide, "sapo": False, "vespo": False}.get(name, wide)
    for sign in (1, -1):  # the data is worth testing with: clipped and not, for either sign
        mine = torch.cat([torch.full_like(r.mask, r.advantage * sign > 0) & r.mask for r in responses])
        assert not clips_here or (clipped[mine].any() and not clipped[mine].all())


@pytest.mark.parametrize("name", ARMS)
def test_statistics(name: str) -> None:
    responses = make_responses(wide=True)
    _, _, clipped = expected(name, responses)
    result, _ = run(AlgorithmConfig(name=name), *pack(responses, tail=2))
    stats, parts = result.stats, clipped.split([r.mask.numel() for r in responses])
    means = [float((r.kept(r.logprobs) - r.kept(r.old)).mean()) if r.mask.any() else 0.0 for r in responses]
    assert stats.log_ratio.tolist() == pytest.approx(means, rel=1e-12)
    assert stats.num_response_tokens.tolist() == [int(r.mask.sum()) for r in responses]
    assert stats.clipped.tolist() == [bool(part.any()) for part in parts]
    assert stats.clipped_tokens.tolist() == [*clipped.tolist(), False, False]


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ARMS)
def test_micro_batches_add_up(name: str, wide: bool) -> None:
    """Padding behind the last sequence and a micro-batch without any response token change nothing."""
    responses = make_responses(wide=wide)
    whole, gradient = run(AlgorithmConfig(name=name), *pack(responses))
    shares, parts = [], []
    for part, tail in ((responses[:2], 3), (responses[2:3], 0), (responses[3:4], 1), (responses[4:], 2)):
        result, share = run(AlgorithmConfig(name=name), *pack(part, tail))
        shares.append(result.loss)
        assert not share[share.numel() - tail :].any()
        parts.append(share[: share.numel() - tail])
    torch.testing.assert_close(sum(shares), whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ARMS)
def test_weights_scale_a_token_s_gradient_and_0_leaves_it_out(name: str) -> None:
    logprobs, batch = pack(make_responses(wide=False))
    algorithm = build(AlgorithmConfig(name=name))
    weights = torch.where(batch.response_mask, torch.arange(logprobs.numel()) % 3 / 2.0, NAN)

    def gradient(weights: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = logprobs.clone().requires_grad_()
        loss, _ = algorithm.loss(leaf, batch, num_sequences=N, num_tokens=NUM_TOKENS, weights=weights)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    _, plain = gradient(None)
    _, weighted = gradient(weights)
    torch.testing.assert_close(weighted, torch.where(batch.response_mask, plain * weights, 0.0), rtol=1e-12, atol=0)
    halved, _ = gradient(torch.full_like(weights, 0.5))
    torch.testing.assert_close(halved, gradient(None)[0] / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ARMS)
def test_a_ratio_beyond_all_bounds_without_advantage_counts_for_nothing(name: str) -> None:
    logprobs, batch = pack(make_responses(wide=True))
    first = torch.arange(logprobs.numel()) < 7
    batch.advantages[0] = 0.0
    expected_loss, expected_gradient = run(AlgorithmConfig(name=name), logprobs, batch)
    extreme = torch.where(first & batch.response_mask, logprobs + 2000.0, logprobs)
    result, gradient = run(AlgorithmConfig(name=name), extreme, batch)
    torch.testing.assert_close(result.loss, expected_loss.loss, rtol=1e-12, atol=0)
    assert torch.equal(gradient, expected_gradient) and not gradient[first].any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shift", [900.0, -900.0])
@pytest.mark.parametrize("name", ["sapo", "vespo"])
def test_gate_and_kernel_are_0_far_away_where_their_parts_overflow(name: str, shift: float, sign: float) -> None:
    """e^900 is beyond float64, and φ(W) and the gate's slope are 0 there."""
    logprobs, batch = pack(make_responses(wide=True)[:1])
    batch.advantages[0] = sign
    result, gradient = run(AlgorithmConfig(name=name), logprobs + shift, batch)
    assert result.loss.isfinite() and not gradient.any()


@pytest.mark.parametrize("name", ["gmpo", "luspo", "vespo"])
def test_an_objective_of_whole_responses_refuses_advantages_by_token(name: str) -> None:
    logprobs, batch = pack(make_responses(wide=True))
    batch = replace(batch, advantages=torch.ones(logprobs.numel(), dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"{name} takes one advantage a response, \[9\]"):
        run(AlgorithmConfig(name=name), logprobs, batch)


@pytest.mark.parametrize("name", ["cispo", "sapo", "minirl"])
def test_an_objective_of_tokens_takes_advantages_by_token(name: str) -> None:
    logprobs, batch = pack(make_responses(wide=True))
    by_token = torch.repeat_interleave(batch.advantages, batch.lengths)
    once = run(AlgorithmConfig(name=name), logprobs, batch)
    each = run(AlgorithmConfig(name=name), logprobs, replace(batch, advantages=by_token))
    assert torch.equal(once[0].loss, each[0].loss) and torch.equal(once[1], each[1])


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "cispo": {"clip_high": 0.3},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.9},
    "sapo": {"sapo_tau_positive": 0.5, "sapo_tau_negative": 2.0},
    "luspo": {"clip_low": 1e-4, "clip_high": 1e-4, "dual_clip": 1.001},
    "vespo": {"vespo_c1_positive": 1.0, "vespo_c2_negative": 0.7},
    "minirl": {"clip_low": 0.05, "clip_high": 0.9, "mismatch": "off"},
}


@pytest.mark.parametrize("name", ARMS)
def test_every_setting_is_read(name: str) -> None:
    logprobs, batch = pack(make_responses(wide=name != "luspo"))
    usual = run(AlgorithmConfig(name=name), logprobs, batch)[1]
    for setting, value in OTHER_SETTINGS[name].items():
        changed: dict[str, Any] = {setting: value}
        assert not torch.equal(run(AlgorithmConfig(name=name, **changed), logprobs, batch)[1], usual), setting


# -- Geo-RS and OPSM, by hand ------------------------------------------------------------------------------------------


def by_hand(means: list[float], advantages: list[float]) -> tuple[Tensor, MicroBatch]:
    """Sequences of 1, 2, 3, … response tokens whose mean of log(π_old / μ) is given; NaN outside the responses."""
    responses = []
    for number, (mean, advantage) in enumerate(zip(means, advantages, strict=True), start=1):
        mask = torch.tensor([False] + [True] * number + [False])
        spread = torch.linspace(-1, 1, number) if number > 1 else torch.zeros(1)
        rollout = torch.full((number + 2,), NAN, dtype=torch.float64)
        rollout[mask] = -1.0 - mean + spread.double()
        old = torch.where(mask, -1.0, NAN).double()
        responses.append(Response(mask, old.clone(), old, rollout, advantage))
    return pack(responses)


def kept(weights: Tensor | None, batch: MicroBatch) -> list[bool]:
    """Which sequences are kept, all of their tokens being treated alike; weights are 0 or 1, and 0 outside."""
    assert weights is not None and not weights.requires_grad
    assert not weights[~batch.response_mask].any()
    ends = batch.cu_seqlens.tolist()
    out = []
    for start, end in pairwise(ends):
        [value] = set(weights[start:end][batch.response_mask[start:end]].tolist())
        assert value in (0.0, 1.0)
        out.append(value == 1.0)
    return out


def test_geo_rs_keeps_a_response_whose_mean_ratio_lies_in_the_band() -> None:
    _, batch = by_hand([0.0, 9e-4, -9e-4, 1.1e-3, -1.1e-3, 0.3], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    mismatch = mismatch_of(AlgorithmConfig(mismatch="geometric"))
    assert (mismatch.low, mismatch.high) == (0.999, 1.001)
    assert kept(mismatch.weights(batch), batch) == [True, True, True, False, False, False]
    wider = mismatch_of(AlgorithmConfig(mismatch="geometric", mismatch_low=0.0, mismatch_high=1.2))
    assert kept(wider.weights(batch), batch) == [True, True, True, True, True, False]


def test_opsm_drops_responses_of_negative_advantage_that_the_policy_has_left() -> None:
    """The engine's probability against the present policy's, so that π_old may agree with either."""
    logprobs, batch = by_hand([-0.6, -0.6, -0.4, 0.6, 0.0], [-1.0, 1.0, -1.0, -1.0, -1.0])
    mismatch = mismatch_of(AlgorithmConfig(opsm_delta=0.5))
    assert kept(mismatch.weights(batch, logprobs), batch) == [False, True, True, True, True]
    staler = torch.where(batch.response_mask, logprobs - 0.2, NAN).requires_grad_()
    assert kept(mismatch.weights(batch, staler), batch) == [False, True, False, True, True]
    fresher = torch.where(batch.response_mask, logprobs + 0.2, NAN)
    assert kept(mismatch.weights(batch, fresher), batch) == [True, True, True, True, True]


def test_opsm_comes_on_top_of_a_mismatch_weight() -> None:
    logprobs, batch = by_hand([-0.6, -0.6, 1.0], [-1.0, 1.0, -1.0])
    plain = mismatch_of(AlgorithmConfig(mismatch="truncate")).weights(batch)
    both = mismatch_of(AlgorithmConfig(mismatch="truncate", opsm_delta=0.5)).weights(batch, logprobs)
    assert plain is not None and both is not None
    assert not both[:3].any() and plain[1] > 0
    assert torch.equal(both[3:], plain[3:])


def test_opsm_takes_the_sign_of_each_token_s_advantage() -> None:
    logprobs, batch = by_hand([-0.6, -0.6], [-1.0, 1.0])
    batch = replace(batch, advantages=torch.tensor([0, -1.0, 0, 0, -1.0, 1.0, 0], dtype=torch.float64))
    weights = mismatch_of(AlgorithmConfig(opsm_delta=0.5)).weights(batch, logprobs)
    assert weights is not None and weights.tolist() == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("settings", [{"mismatch": "geometric"}, {"opsm_delta": 0.5}])
def test_a_nan_response_token_is_not_dropped_in_silence(settings: dict[str, Any]) -> None:
    logprobs, batch = by_hand([0.0, 0.0], [-1.0, -1.0])
    batch.rollout_logprobs[4] = NAN
    weights = mismatch_of(AlgorithmConfig(**settings)).weights(batch, logprobs)
    assert weights is not None and weights[batch.response_mask].isnan().tolist() == [False, True, True]
    result, _ = run(AlgorithmConfig(name="grpo", **settings), logprobs, batch)
    assert result.loss.isnan()


def test_dropped_responses_stay_counted() -> None:
    """N does not change: the loss is that of the kept responses alone, with the same divisor."""
    logprobs, batch = by_hand([0.0, 0.3, 0.0], [1.0, -1.0, -0.5])
    config = AlgorithmConfig(name="grpo", mismatch="geometric")
    dropped = replace(batch, advantages=torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64))
    actual, truth = run(config, logprobs, batch), run(AlgorithmConfig(name="grpo"), logprobs, dropped)
    torch.testing.assert_close(actual[0].loss, truth[0].loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(actual[1], truth[1], rtol=1e-7, atol=0)
