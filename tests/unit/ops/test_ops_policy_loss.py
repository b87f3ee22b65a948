"""sequence_policy_loss and sequence_mean against a loop over sequences in float64, and finite differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo_megatron.ops import PolicyLossStats, sequence_mean, sequence_policy_loss

pytestmark = pytest.mark.usefixtures("each_implementation")

LOW, HIGH = 3e-4, 4e-4  # the paper's clip
LOG_LOW, LOG_HIGH = math.log1p(-LOW), math.log1p(HIGH)


@dataclass(frozen=True)
class Pack:
    logprobs: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    response_mask: Tensor  # [T]
    cu_seqlens: Tensor  # [S+1]
    advantages: Tensor  # [S] or [T]

    def loss(self, logprobs: Tensor | None = None, **settings: Any) -> tuple[Tensor, PolicyLossStats]:
        return sequence_policy_loss(
            self.logprobs if logprobs is None else logprobs,
            self.old_logprobs,
            self.response_mask,
            self.cu_seqlens,
            self.advantages,
            **{"clip_low": LOW, "clip_high": HIGH} | settings,
        )

    def gradient(self, grad_output: float = 1.0, **settings: Any) -> Tensor:
        leaf = self.logprobs.clone().requires_grad_()
        loss, _ = self.loss(leaf, **settings)
        (loss * grad_output).backward()
        assert leaf.grad is not None
        return leaf.grad

    def tokens(self, i: int) -> Tensor:
        """Indices of the response tokens of sequence i."""
        start, end = self.cu_seqlens[i : i + 2].tolist()
        return torch.arange(start, end)[self.response_mask[start:end]]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1


def pack(masks: list[str], log_s: list[float], advantages: list[float], *, seed: int = 0) -> Pack:
    """Sequences by their masks ('..xx.x': x is a response token) and exact means of the log ratio."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([c == "x" for text in masks for c in text], dtype=torch.bool)
    cu_seqlens = torch.tensor([0, *[len(text) for text in masks]]).cumsum(0).int()
    old = -torch.rand(mask.numel(), generator=generator, dtype=torch.float64) - 0.1
    difference = torch.randn(mask.numel(), generator=generator, dtype=torch.float64) * 0.02
    result = Pack(old + difference, old, mask, cu_seqlens, torch.tensor(advantages, dtype=torch.float64))
    for i, mean in enumerate(log_s):
        tokens = result.tokens(i)
        if tokens.numel():
            result.logprobs[tokens] += mean - (result.logprobs - old)[tokens].mean()
    return result


def definition(
    p: Pack,
    logprobs: Tensor,
    *,
    clip_low: float = LOW,
    clip_high: float = HIGH,
    dual_clip: float | None = None,
    num_sequences: int | None = None,
    level: str = "sequence",
    weights: Tensor | None = None,
    frozen: Tensor | None = None,
) -> Tensor:
    """The loss, sequence by sequence. A sequence ratio with `frozen` log-probs is sg[s_i] · π / sg[π]."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(p.num_sequences):
        tokens = p.tokens(i)
        if tokens.numel() == 0:
            continue
        difference = logprobs[tokens] - p.old_logprobs[tokens]
        if level == "token":
            ratio = difference.exp()
        elif frozen is None:  # the paper's equation, differentiated as it stands
            ratio = difference.mean().exp().expand(tokens.numel())
        else:
            s = (frozen[tokens] - p.old_logprobs[tokens]).mean().exp()
            ratio = s * (logprobs[tokens] - frozen[tokens]).exp()
        advantage = p.advantages[tokens] if p.advantages.numel() != p.num_sequences else p.advantages[i]
        advantage = advantage.expand(tokens.numel())
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
        if dual_clip is not None:
            value = torch.where(advantage < 0, torch.maximum(value, dual_clip * advantage), value)
        if weights is not None:
            value = value * weights[tokens]
        total = total + value.sum() / tokens.numel()
    return -total / (p.num_sequences if num_sequences is None else num_sequences)


def check(p: Pack, **settings: Any) -> None:
    """Value and gradient equal the definition's, and the gradient its finite differences."""
    frozen = p.logprobs.clone()
    needs_frozen = settings.get("weights") is not None or p.advantages.numel() != p.num_sequences
    frozen_argument: dict[str, Any] = {"frozen": frozen} if needs_frozen else {}
    leaf = p.logprobs.clone().requires_grad_()
    expected = definition(p, leaf, **settings, **frozen_argument)
    (expected_gradient,) = torch.autograd.grad(expected, leaf) if expected.requires_grad else (torch.zeros_like(leaf),)
    actual, _ = p.loss(**settings)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-13, atol=1e-14)
    gradient = p.gradient(**settings)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)

    step = 1e-7
    differences = torch.zeros_like(gradient)
    for t in range(gradient.numel()):
        up, down = frozen.clone(), frozen.clone()
        up[t] += step
        down[t] -= step
        with torch.no_grad():
            differences[t] = (
                definition(p, up, **settings, **frozen_argument) - definition(p, down, **settings, **frozen_argument)
            ) / (2 * step)
    torch.testing.assert_close(gradient, differences, rtol=1e-5, atol=1e-8)


AROUND = [-1e-5, 1e-5]  # much wider than the step of the finite differences


@pytest.mark.parametrize("advantage", [1.3, -0.8])
@pytest.mark.parametrize("bound", [LOG_LOW, LOG_HIGH])
@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize("mask", ["x", "..xxxx", ".xx.x.x."])
def test_sequence_ratio_around_each_bound(advantage: float, bound: float, offset: float, mask: str) -> None:
    p = pack([mask, ".xx"], [bound + offset, 1e-4], [advantage, 0.5])
    check(p)
    is_clipped = (advantage > 0 and bound + offset > LOG_HIGH) or (advantage < 0 and bound + offset < LOG_LOW)
    _, stats = p.loss()
    assert stats.clipped.tolist() == [is_clipped, False]
    assert stats.clipped_tokens[p.tokens(0)].tolist() == [is_clipped] * len(p.tokens(0))
    assert (p.gradient()[p.tokens(0)] == 0).all() == is_clipped


@pytest.mark.parametrize("advantage", [1.3, -0.8])
@pytest.mark.parametrize("bound", [LOG_LOW, LOG_HIGH])
def test_a_ratio_exactly_at_a_bound_keeps_its_gradient(advantage: float, bound: float) -> None:
    p = pack(["x"], [0.0], [advantage])
    p = replace(p, logprobs=torch.tensor([bound], dtype=torch.float64), old_logprobs=torch.zeros(1).double())
    loss, stats = p.loss()
    assert not stats.clipped.any()
    assert loss.item() == pytest.approx(-math.exp(bound) * advantage, rel=1e-15)
    assert p.gradient().item() == pytest.approx(-math.exp(bound) * advantage, rel=1e-15)


@pytest.mark.parametrize("advantage", [1.3, -0.8])
@pytest.mark.parametrize("log_s", [0.5, -0.5])
def test_ratios_far_outside(advantage: float, log_s: float) -> None:
    check(pack(["..xxx", "x"], [log_s, -log_s], [advantage, advantage]))


@pytest.mark.parametrize("offset", AROUND)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_dual_clip(offset: float, advantage: float, level: str) -> None:
    dual = 1.5
    p = pack(["..xxx", "x", ".xx"], [math.log(dual) + offset, 2.0, 1e-4], [advantage, advantage, 0.3])
    if level == "token":  # every token of the first sequence near the bound
        p.logprobs[2:5] = p.old_logprobs[2:5] + math.log(dual) + offset
    check(p, dual_clip=dual, level=level)
    _, stats = p.loss(dual_clip=dual, level=level)
    is_clipped = advantage > 0 or offset > 0
    assert stats.clipped[0] == is_clipped
    assert (p.gradient(dual_clip=dual, level=level)[p.tokens(0)] == 0).all() == is_clipped


def test_dual_clip_bounds_the_loss_of_an_infinite_ratio() -> None:
    """A clamp that was computed and never used let inf and NaN through elsewhere (OpenRLHF #1293), and a dual
    clip was offered for GSPO and never read (verl)."""
    p = pack(["xx", "x"], [1000.0, 1000.0], [-0.5, 0.5])
    loss, _ = p.loss(dual_clip=3.0)
    assert loss.item() == pytest.approx(0.5 * (3.0 * 0.5 - (1 + HIGH) * 0.5), rel=1e-12)
    assert torch.equal(p.gradient(dual_clip=3.0), torch.zeros(3, dtype=torch.float64))


def test_an_infinite_ratio_without_advantage_or_weight_counts_for_nothing() -> None:
    p = pack(["xx", "x"], [1000.0, 1e-4], [0.0, 0.5])
    loss, _ = p.loss()
    assert loss.item() == pytest.approx(-0.25 * math.exp(1e-4), rel=1e-12)
    assert p.gradient().isfinite().all()
    negative = replace(p, advantages=torch.tensor([-1.0, 0.5]).double())
    weighted, _ = negative.loss(weights=torch.tensor([0.0, 0.0, 1.0]))
    assert weighted.item() == pytest.approx(loss.item(), rel=1e-12)
    assert negative.gradient(weights=torch.tensor([0.0, 0.0, 1.0])).isfinite().all()


EVERY_BRANCH = [LOG_LOW - 1e-4, LOG_LOW + 1e-4, 0.0, LOG_HIGH - 1e-4, LOG_HIGH + 1e-4, 1.0]


@pytest.mark.parametrize("grad_output", [1.0, -0.37, 1e3])
@pytest.mark.parametrize("num_sequences", [None, 40])
def test_every_branch_in_one_pack(grad_output: float, num_sequences: int | None) -> None:
    masks = ["..xx.x", "x", "....", "xxx..", ".x", "..xxxxxx."] * 2
    p = pack(masks, EVERY_BRANCH * 2, [1.0] * 6 + [-0.7] * 6)
    check(p, dual_clip=2.0, num_sequences=num_sequences)
    torch.testing.assert_close(
        p.gradient(grad_output, num_sequences=num_sequences),
        grad_output * p.gradient(num_sequences=num_sequences),
        rtol=1e-14,
        atol=0,
    )


def test_gspo_token_with_advantages_that_change_sign_inside_a_response() -> None:
    p = pack(["..xx.xx", "xxxx", ".xx"], [LOG_HIGH + 1e-4, LOG_LOW - 1e-4, 1e-4], [0.0] * 3)
    advantages = torch.tensor([9, 9, 1, -1, 9, 0.5, -2, -1, 1, 0, -0.3, 9, 1, -1], dtype=torch.float64)
    p = replace(p, advantages=advantages)
    check(p)
    check(p, dual_clip=1.0003)
    _, stats = p.loss()
    assert stats.clipped_tokens.tolist() == [
        *[False, False, True, False, False, True, False],  # above the band: the positive ones
        *[True, False, False, True],  # below it: the negative ones
        *[False] * 3,
    ]
    assert stats.clipped.tolist() == [True, True, False]


def test_gspo_token_with_equal_advantages_is_gspo() -> None:
    """Section 4.3 of the paper: the same value, clip and gradient."""
    masks = ["..xx.x", "x", "....", "xxx..", ".x", "..xxxxxx."] * 2
    p = pack(masks, EVERY_BRANCH * 2, [1.0, -0.7, 0.3] * 4)
    lengths = p.cu_seqlens.diff().long()
    q = replace(p, advantages=p.advantages.repeat_interleave(lengths))
    (loss, stats), (token_loss, token_stats) = p.loss(dual_clip=2.0), q.loss(dual_clip=2.0)
    torch.testing.assert_close(loss, token_loss, rtol=1e-15, atol=0)
    torch.testing.assert_close(p.gradient(dual_clip=2.0), q.gradient(dual_clip=2.0), rtol=1e-15, atol=0)
    assert torch.equal(stats.clipped, token_stats.clipped)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_token_level_is_grpo(advantage: float, per_token: bool) -> None:
    p = pack(["..xx.xxx", "x", "...", ".xxxx"], [0.0] * 4, [advantage, -advantage, 1.0, 0.5 * advantage])
    offsets = [math.log1p(0.27) + 1e-5, math.log1p(0.27) - 1e-5, math.log1p(-0.2) - 1e-5, math.log1p(-0.2) + 1e-5, 0.0]
    p.logprobs[p.tokens(0)] = p.old_logprobs[p.tokens(0)] + torch.tensor(offsets, dtype=torch.float64)
    if per_token:
        signs = torch.tensor([1.0, -1.0]).double().repeat(p.logprobs.numel())[: p.logprobs.numel()]
        p = replace(p, advantages=signs)
    check(p, clip_low=0.2, clip_high=0.27, level="token")
    check(p, clip_low=0.2, clip_high=0.27, level="token", dual_clip=1.2)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_weights_scale_the_numerator_only(level: str) -> None:
    p = pack(["..xx.xxx", "x", "...", ".xxxx"], [1e-4, LOG_HIGH + 1e-4, 0.0, 0.1], [1.0, 0.4, 1.0, -0.5])
    weights = torch.rand(p.logprobs.numel(), dtype=torch.float64) * 2
    weights[3] = 0.0
    check(p, level=level, weights=weights)
    ones, _ = p.loss(level=level, weights=torch.ones_like(weights))
    torch.testing.assert_close(ones, p.loss(level=level)[0], rtol=1e-15, atol=0)
    doubled, _ = p.loss(level=level, weights=2 * torch.ones_like(weights))
    torch.testing.assert_close(doubled, 2 * ones, rtol=1e-15, atol=0)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_token", [False, True])
def test_nothing_leaks_from_under_the_mask(level: str, poison: float, per_token: bool) -> None:
    """TRL, Liger and verl return NaN here; multiplying by the mask gives 0 · inf."""
    p = pack(["..xx.x.", "...", "x", "xx"], [1e-4, 0.0, LOG_HIGH + 1e-4, 1.0], [0.5, 0.7, 1.0, -1.0])
    if per_token:
        p = replace(p, advantages=p.advantages.repeat_interleave(p.cu_seqlens.diff().long()))
    weights = torch.ones_like(p.logprobs)
    dirty = replace(
        p,
        logprobs=torch.where(p.response_mask, p.logprobs, poison),
        old_logprobs=torch.where(p.response_mask, p.old_logprobs, -poison),
        advantages=p.advantages.clone(),
    )
    if per_token:
        dirty.advantages[~p.response_mask] = poison
    else:
        dirty.advantages[1] = poison  # the sequence without response tokens
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"weights": torch.where(p.response_mask, weights, poison)}, {"weights": weights}),
    ]
    for arguments, clean in cases:
        loss, stats = dirty.loss(level=level, **arguments)
        expected, expected_stats = p.loss(level=level, **clean)
        assert torch.equal(loss, expected)
        assert torch.equal(stats.log_ratio, expected_stats.log_ratio)
        gradient = dirty.gradient(level=level, **arguments)
        assert torch.equal(gradient, p.gradient(level=level, **clean))
        assert torch.equal(gradient[~p.response_mask], torch.zeros_like(gradient[~p.response_mask]))


def test_nan_of_a_response_token_shows() -> None:
    p = pack(["xx", "xx"], [1e-4, 1e-4], [1.0, 1.0])
    p.logprobs[0] = math.nan
    assert p.loss()[0].isnan() and p.gradient()[0].isnan()


def test_statistics() -> None:
    p = pack(["..xx.x", "....", "x"], [LOG_HIGH + 1e-4, 0.0, -1e-5], [1.0, 1.0, 1.0])
    _, stats = p.loss(level="token", clip_low=0.2, clip_high=0.27)
    torch.testing.assert_close(
        stats.log_ratio, torch.tensor([LOG_HIGH + 1e-4, 0.0, -1e-5], dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert stats.num_response_tokens.tolist() == [3, 0, 1] and stats.num_response_tokens.dtype == torch.int64
    assert stats.clipped.dtype == stats.clipped_tokens.dtype == torch.bool
    assert not any(x.requires_grad for x in vars(stats).values())


def test_no_response_token_at_all_still_has_a_graph() -> None:
    """A context-parallel rank or an empty micro-batch must run backward like the others."""
    p = pack(["...", "."], [0.0, 0.0], [1.0, -1.0])
    loss, stats = p.loss()
    assert loss.item() == 0 and torch.equal(p.gradient(), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(stats.log_ratio, torch.zeros(2, dtype=torch.float64))
    values = torch.randn(4, requires_grad=True)
    sequence_mean(values, p.response_mask, p.cu_seqlens).backward()
    assert values.grad is not None and torch.equal(values.grad, torch.zeros(4))


def test_no_sequence_and_no_token() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    p = Pack(empty, empty, empty.bool(), torch.zeros(1, dtype=torch.int32), empty)
    loss, stats = p.loss(num_sequences=8)
    assert loss.item() == 0 and stats.log_ratio.shape == (0,) and p.gradient(num_sequences=8).shape == (0,)
    padding = Pack(torch.zeros(3), torch.zeros(3), torch.ones(3).bool(), p.cu_seqlens, torch.zeros(0))
    assert padding.loss(num_sequences=8)[0].item() == 0


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("filler", [math.nan, -2.0])
def test_tokens_behind_the_last_sequence_count_as_masked(per_token: bool, filler: float) -> None:
    p = pack(["..xx", "x"], [1e-4, 0.1], [1.0, -1.0])
    if per_token:
        p = replace(p, advantages=torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    tail = torch.full((3,), filler, dtype=torch.float64)
    longer = Pack(
        torch.cat([p.logprobs, tail]),
        torch.cat([p.old_logprobs, tail]),
        torch.cat([p.response_mask, torch.ones(3).bool()]),
        p.cu_seqlens,
        torch.cat([p.advantages, tail]) if per_token else p.advantages,
    )
    assert torch.equal(longer.loss()[0], p.loss()[0])
    assert torch.equal(longer.gradient(), torch.cat([p.gradient(), torch.zeros(3).double()]))
    mean = sequence_mean(longer.logprobs, longer.response_mask, longer.cu_seqlens)
    assert torch.equal(mean, sequence_mean(p.logprobs, p.response_mask, p.cu_seqlens))


def test_empty_sequences_are_counted() -> None:
    p = pack(["xx", "xx"], [1e-4, 1e-4], [1.0, 1.0])
    with_empty = pack(["xx", "..", "xx", ""], [1e-4, 0.0, 1e-4, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert with_empty.loss()[0].item() == pytest.approx(p.loss()[0].item() / 2, rel=1e-15)


def test_lengths_do_not_weight_sequences() -> None:
    """TRL #3823 broadcast a loss of shape (B, 1) over the token mask; NeMo-RL #2269 took the sum for the mean."""
    p = pack(["x", "x" * 50], [1e-4, 1e-4], [1.0, -0.5])
    loss, stats = p.loss()
    assert loss.item() == pytest.approx(-0.5 * math.exp(1e-4) * (1.0 - 0.5), rel=1e-12)
    assert stats.log_ratio.tolist() == pytest.approx([1e-4, 1e-4], rel=1e-9)
    gradient = p.gradient()
    assert gradient[0].item() == pytest.approx(-0.5 * math.exp(1e-4), rel=1e-12)
    assert gradient[1:].sum().item() == pytest.approx(0.25 * math.exp(1e-4), rel=1e-12)


def test_a_pack_is_not_one_sequence() -> None:
    """tunix #1662: the ratio ran over the whole pack."""
    p = pack([".xx", "..xxx"], [1e-4, 1e-4], [1.0, 1.0])
    q = replace(p, logprobs=p.logprobs.clone())
    q.logprobs[5:] += 3.0
    before, after = p.loss()[1].log_ratio, q.loss()[1].log_ratio
    assert after[0] == before[0] and after[1] > before[1] + 2.9


def test_micro_batches_add_up() -> None:
    """N is the whole batch's on every micro-batch: dividing again by the number of parts is a bug others had
    (verl #5798)."""
    masks, advantages = ["..xx.x", "x", "....", "xxx..", ".x", "..xxxxxx."], [1.0, -1.0, 0.5, 0.2, -0.7, 1.0]
    whole = pack(masks, EVERY_BRANCH, advantages)
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        tokens = slice(int(whole.cu_seqlens[first]), int(whole.cu_seqlens[last]))
        part = Pack(
            whole.logprobs[tokens],
            whole.old_logprobs[tokens],
            whole.response_mask[tokens],
            whole.cu_seqlens[first : last + 1] - whole.cu_seqlens[first],
            whole.advantages[first:last],
        )
        parts.append((part.loss(num_sequences=6)[0], part.gradient(num_sequences=6)))
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.loss()[0].item(), rel=1e-14)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), whole.gradient(), rtol=1e-14, atol=0)


def test_float32_log_ratios_are_exact_enough_for_the_clip() -> None:
    """log s of float32 log-probs is right to its own last digit, at any length: subtract first, sum in float64."""
    p = pack(["." + "x" * 4096], [LOG_HIGH + 2e-8], [1.0])
    single = replace(p, logprobs=p.logprobs.float(), old_logprobs=p.old_logprobs.float())
    exact = (single.logprobs.double() - single.old_logprobs.double())[1:].mean()
    loss, stats = single.loss()
    assert loss.dtype == stats.log_ratio.dtype == torch.float32
    assert abs(stats.log_ratio.item() - exact.item()) < 1e-10
    assert bool(stats.clipped) == (exact.item() > LOG_HIGH)
    assert single.gradient().dtype == torch.float32
    naive = single.logprobs[1:].sum() - single.old_logprobs[1:].sum()
    assert abs(naive.item() / 4096 - exact.item()) > 1e-9  # what a difference of float32 sums would give


def test_equal_logprobs_give_a_ratio_of_exactly_one() -> None:
    p = pack(["..xx", "xxx"], [0.0, 0.0], [1.0, -1.0])
    p = replace(p, logprobs=p.old_logprobs.clone())
    _, stats = p.loss()
    assert torch.equal(stats.log_ratio, torch.zeros(2, dtype=torch.float64)) and not stats.clipped.any()


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        logprobs = torch.randn(6, requires_grad=True)
        p = Pack(logprobs, torch.randn(6), torch.ones(6).bool(), torch.tensor([0, 2, 6]), torch.randn(2))
        loss, _ = p.loss(dual_clip=2.0, weights=torch.ones(6))
        (loss + sequence_mean(logprobs, p.response_mask, p.cu_seqlens)).backward()


def test_sequence_mean_and_its_gradient() -> None:
    p = pack(["..xx.x", "x", "....", "xxx.."], [0.0] * 4, [0.0] * 4)
    values = torch.randn(p.logprobs.numel(), dtype=torch.float64, requires_grad=True)
    expected = torch.stack([values[p.tokens(i)].sum() / max(len(p.tokens(i)), 1) for i in range(4)]).sum() / 10
    actual = sequence_mean(values, p.response_mask, p.cu_seqlens, num_sequences=10)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-16)
    (expected_gradient,) = torch.autograd.grad(expected * -1.7, values)
    (gradient,) = torch.autograd.grad(actual * -1.7, values)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-14, atol=0)
    poisoned = torch.where(p.response_mask, values, math.nan).detach().requires_grad_()
    again = sequence_mean(poisoned, p.response_mask, p.cu_seqlens, num_sequences=10)
    assert torch.equal(again, actual)
    (gradient,) = torch.autograd.grad(again * -1.7, poisoned)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-14, atol=0)


@st.composite
def ragged_packs(draw: st.DrawFn) -> tuple[Pack, dict[str, Any]]:
    masks = draw(st.lists(st.text(alphabet=".x", max_size=7), min_size=1, max_size=6))
    count = len(masks)
    log_s = draw(st.lists(st.sampled_from([*EVERY_BRANCH, -0.3]), min_size=count, max_size=count))
    advantages = draw(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.5]), min_size=count, max_size=count))
    p = pack(masks, log_s, advantages, seed=draw(st.integers(0, 999)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()) and p.logprobs.numel() != count:
        p = replace(p, advantages=torch.randn(p.logprobs.numel(), generator=generator, dtype=torch.float64))
    level = draw(st.sampled_from(["sequence", "token"]))
    clip = (LOW, HIGH) if level == "sequence" else (0.02, 0.027)
    weights = torch.rand(p.logprobs.numel(), generator=generator, dtype=torch.float64) * 2
    return p, {
        "clip_low": clip[0],
        "clip_high": clip[1],
        "dual_clip": draw(st.sampled_from([None, 1.01, 2.0])),
        "num_sequences": draw(st.sampled_from([None, 64])),
        "level": level,
        "weights": draw(st.sampled_from([None, weights])),
    }


@settings(max_examples=150, deadline=None)
@given(ragged_packs())
def test_any_ragged_pack(case: tuple[Pack, dict[str, Any]]) -> None:
    p, arguments = case
    leaf = p.logprobs.clone().requires_grad_()
    frozen = p.logprobs.clone()
    expected = definition(p, leaf, **arguments, frozen=frozen)
    (gradient,) = torch.autograd.grad(expected, leaf) if expected.requires_grad else (torch.zeros_like(leaf),)
    loss, stats = p.loss(**arguments)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(p.gradient(**arguments), gradient, rtol=1e-10, atol=1e-14)
    assert stats.num_response_tokens.tolist() == [len(p.tokens(i)) for i in range(p.num_sequences)]
    assert stats.clipped.tolist() == [bool(stats.clipped_tokens[p.tokens(i)].any()) for i in range(p.num_sequences)]
    assert not stats.clipped_tokens[~p.response_mask].any()


BAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "response_mask has dtype": {"response_mask": torch.ones(4)},
    "response_mask has shape": {"response_mask": torch.ones(3).bool()},
    "old_logprobs has shape": {"old_logprobs": torch.zeros(3)},
    "half precision cannot resolve a clip": {"logprobs": torch.zeros(4, dtype=torch.bfloat16)},
    "old_logprobs has dtype": {"old_logprobs": torch.zeros(4, dtype=torch.float16)},
    "cu_seqlens has dtype": {"cu_seqlens": torch.tensor([0.0, 2.0, 4.0])},
    "cu_seqlens has shape": {"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)},
    r"must be \[S\] = \(2,\) or \[T\] = \(4,\)": {"advantages": torch.zeros(3)},
    "weights has shape": {"weights": torch.zeros(2)},
    'level="word"': {"level": "word"},
    "clip_low=1.5": {"clip_low": 1.5},
    "clip_high=0": {"clip_high": 0.0},
    "dual_clip=0.9": {"dual_clip": 0.9},
    "num_sequences=0": {"num_sequences": 0},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message: str) -> None:
    arguments: dict[str, Any] = {
        "logprobs": torch.zeros(4),
        "old_logprobs": torch.zeros(4),
        "response_mask": torch.ones(4).bool(),
        "cu_seqlens": torch.tensor([0, 2, 4]),
        "advantages": torch.zeros(2),
        "clip_low": LOW,
        "clip_high": HIGH,
    }
    sequence_policy_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        sequence_policy_loss(**arguments | BAD_ARGUMENTS[message])
