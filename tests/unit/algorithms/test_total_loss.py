"""The whole objective: policy loss, k3 KL, entropy bonus and mismatch weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gspo_megatron.algorithms import Mismatch, build, objective
from gspo_megatron.algorithms.total_loss import k3
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.types import MicroBatch

RESPONSES = ["..xx.x", "x", "...", ".xxxx"]
MASK = torch.tensor([c == "x" for text in RESPONSES for c in text])
CU_SEQLENS = torch.tensor([0, 6, 7, 10, 15], dtype=torch.int32)
TOKENS = MASK.numel()


def normal(seed: int) -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD = -normal(0).abs()
LOGPROBS = OLD + 0.1 * normal(1)
REFERENCE = OLD + 0.2 * normal(2)
ROLLOUT = OLD + 0.7 * normal(3)
ENTROPY = normal(4).abs()

BATCH = MicroBatch(
    token_ids=torch.zeros(TOKENS, dtype=torch.long),
    targets=torch.zeros(TOKENS, dtype=torch.long),
    positions=torch.arange(TOKENS),
    cu_seqlens=CU_SEQLENS,
    sequence_ids=torch.arange(4),
    lengths=CU_SEQLENS.diff().long(),
    response_mask=MASK,
    rollout_logprobs=ROLLOUT,
    advantages=torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=torch.float64),
    max_seqlen=6,
    num_padding_tokens=0,
    old_logprobs=OLD,
    reference_logprobs=REFERENCE,
)
OFF = Mismatch()
N = 7


def per_sequence_mean(values: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        kept = values[start:end][MASK[start:end]]
        if kept.numel():
            total = total + kept.mean()
    return total / N


def test_terms_and_their_sum() -> None:
    algorithm = build(AlgorithmConfig(name="grpo", kl_coefficient=0.3, entropy_coefficient=0.02))
    result = objective(algorithm, LOGPROBS, ENTROPY, BATCH, num_sequences=N, mismatch=OFF)
    policy_loss, _ = algorithm.loss(LOGPROBS, BATCH, num_sequences=N)
    difference = LOGPROBS - REFERENCE
    kl = per_sequence_mean((-difference).exp() - 1 + difference)
    entropy = per_sequence_mean(ENTROPY)
    assert result.kl is not None
    torch.testing.assert_close(result.policy_loss, policy_loss)
    torch.testing.assert_close(result.kl, kl)
    torch.testing.assert_close(result.entropy, entropy)
    torch.testing.assert_close(result.loss, policy_loss + 0.3 * kl - 0.02 * entropy)


def test_gradients_are_those_of_the_specification() -> None:
    """dL/dlogp = (policy) + β (1 - e^-d) / (N T_i); dL/dH = -a / (N T_i)."""
    algorithm = build(AlgorithmConfig(name="grpo", kl_coefficient=0.3, entropy_coefficient=0.02))
    logprobs, entropy = LOGPROBS.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    result = objective(algorithm, logprobs, entropy, BATCH, num_sequences=N, mismatch=OFF)
    grad_logprobs, grad_entropy = torch.autograd.grad(result.loss, (logprobs, entropy))

    alone = LOGPROBS.clone().requires_grad_()
    (policy,) = torch.autograd.grad(algorithm.loss(alone, BATCH, num_sequences=N)[0], alone)
    share = torch.cat(
        [torch.full((len(text),), 1 / (N * max(text.count("x"), 1)), dtype=torch.float64) for text in RESPONSES]
    )
    share = share * MASK
    torch.testing.assert_close(grad_logprobs, policy + 0.3 * share * (1 - (REFERENCE - LOGPROBS).exp()))
    torch.testing.assert_close(grad_entropy, -0.02 * share)


def test_terms_that_are_off_have_no_gradient_and_are_still_measured() -> None:
    algorithm = build(AlgorithmConfig(name="grpo"))
    logprobs, entropy = LOGPROBS.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    result = objective(algorithm, logprobs, entropy, BATCH, num_sequences=N, mismatch=OFF)
    assert result.kl is not None and result.kl > 0 and result.entropy > 0
    assert torch.equal(result.loss.detach(), result.policy_loss)
    grad_logprobs, grad_entropy = torch.autograd.grad(result.loss, (logprobs, entropy), allow_unused=True)
    assert grad_entropy is None
    alone = LOGPROBS.clone().requires_grad_()
    (policy,) = torch.autograd.grad(algorithm.loss(alone, BATCH, num_sequences=N)[0], alone)
    assert torch.equal(grad_logprobs, policy)
    assert not result.policy_loss.requires_grad and not result.kl.requires_grad and not result.entropy.requires_grad


def test_kl_is_none_without_reference_logprobs() -> None:
    batch = replace(BATCH, reference_logprobs=None)
    result = objective(build(AlgorithmConfig()), LOGPROBS, ENTROPY, batch, num_sequences=N, mismatch=OFF)
    assert result.kl is None
    with pytest.raises(AssertionError, match="reference log-prob pass"):
        objective(build(AlgorithmConfig(kl_coefficient=0.1)), LOGPROBS, ENTROPY, batch, num_sequences=N, mismatch=OFF)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["off", "truncate", "mask"])
def test_nothing_leaks_from_under_the_mask(poison: float, mode: str) -> None:
    algorithm = build(AlgorithmConfig(name="gspo", kl_coefficient=0.3, entropy_coefficient=0.02))
    mismatch = Mismatch(mode)  # type: ignore[arg-type]

    def hide(values: Tensor, what: float) -> Tensor:
        return torch.where(MASK, values, what)

    def run(batch: MicroBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        leaves = [logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()]
        result = objective(algorithm, leaves[0], leaves[1], batch, num_sequences=N, mismatch=mismatch)
        return (result.loss.detach(), *torch.autograd.grad(result.loss, leaves))

    dirty = replace(
        BATCH,
        old_logprobs=hide(OLD, -poison),
        reference_logprobs=hide(REFERENCE, -poison),
        rollout_logprobs=hide(ROLLOUT, poison),
    )
    for actual, expected in zip(
        run(dirty, hide(LOGPROBS, poison), hide(ENTROPY, poison)), run(BATCH, LOGPROBS, ENTROPY), strict=True
    ):
        assert torch.equal(actual, expected)


def test_k3_is_never_negative_and_exact_for_small_differences() -> None:
    logprobs = torch.full((TOKENS,), -3.0)
    assert torch.equal(k3(logprobs, logprobs, MASK), torch.zeros(TOKENS, dtype=torch.float64))
    values = k3(logprobs, logprobs + 1e-3, MASK)[MASK]
    difference = (logprobs.double() - (logprobs + 1e-3).double())[MASK]
    torch.testing.assert_close(values, difference.square() / 2, rtol=1e-3, atol=0)
    assert (k3(LOGPROBS, REFERENCE, MASK) >= 0).all()


def test_no_weights_when_off() -> None:
    assert OFF.weights(BATCH) is None


def test_truncated_and_masked_weights() -> None:
    ratio = torch.tensor([0.1, 0.49, 0.5, 1.0, 2.0, 2.1, 50.0, 0.9])
    mask = torch.tensor([True] * 7 + [False])
    batch = replace(BATCH, old_logprobs=ratio.log(), rollout_logprobs=torch.zeros(8), response_mask=mask)
    truncated = Mismatch("truncate", 0.5, 2.0).weights(batch)
    assert truncated is not None and truncated.dtype == torch.float32
    assert truncated.tolist() == pytest.approx([0.1, 0.49, 0.5, 1.0, 2.0, 2.0, 2.0, 0.0])
    kept = Mismatch("mask", 0.4999, 2.0001).weights(batch)
    assert kept is not None
    assert kept.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo"])
def test_weights_scale_the_policy_term_alone_and_are_detached(name: str) -> None:
    config = AlgorithmConfig(name=name, kl_coefficient=0.3, entropy_coefficient=0.02, mismatch="truncate")
    algorithm, mismatch = build(config), Mismatch.from_config(config)
    assert mismatch == Mismatch("truncate", 0.5, 2.0)
    old = OLD.clone().requires_grad_()  # even so, no gradient may flow into the weights
    batch = replace(BATCH, old_logprobs=old)
    logprobs = LOGPROBS.clone().requires_grad_()
    result = objective(algorithm, logprobs, ENTROPY, batch, num_sequences=N, mismatch=mismatch)
    unweighted = objective(algorithm, LOGPROBS, ENTROPY, BATCH, num_sequences=N, mismatch=OFF)
    weights = (OLD - ROLLOUT).exp().clamp(max=2.0).float()
    expected, _ = algorithm.loss(LOGPROBS, BATCH, num_sequences=N, weights=weights)
    torch.testing.assert_close(result.policy_loss, expected, rtol=1e-6, atol=0)
    assert result.kl is not None and unweighted.kl is not None
    assert torch.equal(result.kl, unweighted.kl) and torch.equal(result.entropy, unweighted.entropy)
    result.loss.backward()
    applied = mismatch.weights(batch)
    assert old.grad is None and applied is not None and not applied.requires_grad


def test_a_nan_response_token_shows_in_every_mode() -> None:
    broken = ROLLOUT.clone()
    broken[2] = math.nan
    for mode in ("truncate", "mask"):
        weights = Mismatch(mode).weights(replace(BATCH, rollout_logprobs=broken))  # type: ignore[arg-type]
        assert weights is not None and weights[2].isnan() and weights.isnan().sum() == 1
