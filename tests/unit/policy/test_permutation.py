"""Tokens to experts and back: Megatron's values and gradients, sums in float32 and in a fixed order."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from gspo_megatron.policy.permutation import permute, sort_chunks, unpermute

TOKENS, HIDDEN, EXPERTS = 37, 8, 16


def routing(k: int) -> tuple[Tensor, Tensor]:
    """[T, E] chosen experts and probabilities; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, -1] = -1
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, scores.topk(k).indices, True)
    return chosen, torch.rand(TOKENS, EXPERTS, generator=generator) * chosen


@pytest.mark.parametrize("k", [1, 2, 8])
def test_values_and_gradients_are_megatrons(k: int) -> None:
    chosen, probs = routing(k)
    results = []
    for to_experts, back in ((permute, unpermute), (moe_utils.permute, moe_utils.unpermute)):
        tokens = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights = probs.double()
        tokens.requires_grad_(), weights.requires_grad_()
        rows, row_probs, token_of_row = to_experts(tokens, chosen, probs=weights, num_out_tokens=TOKENS * k)
        assert row_probs is not None
        out = back(rows.sin() * row_probs[:, None], token_of_row, restore_shape=tokens.shape)
        out.square().sum().backward()
        results.append((rows, row_probs, token_of_row, out, tokens.grad, weights.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rounded_once() -> None:
    """Sums in bfloat16, in any order, are off by several roundings."""
    chosen, _ = routing(8)
    tokens = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    rows, _, token_of_row = permute(tokens, chosen)
    values = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    exact = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64).index_add(0, token_of_row, values.double()).bfloat16()
    assert torch.equal(unpermute(values, token_of_row, restore_shape=tokens.shape), exact)
    one_by_one = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    for row, token in zip(values.detach(), token_of_row.tolist(), strict=True):
        one_by_one[token] += row
    assert not torch.equal(one_by_one, exact)
    rows.backward(values)
    assert tokens.grad is not None and torch.equal(tokens.grad, exact)


def test_no_tokens() -> None:
    tokens = torch.randn(0, HIDDEN, requires_grad=True)
    rows, _, token_of_row = permute(tokens, torch.zeros(0, EXPERTS, dtype=torch.bool))
    out = unpermute(rows, token_of_row, restore_shape=tokens.shape)
    out.sum().backward()
    assert rows.shape == out.shape == (0, HIDDEN)
    assert tokens.grad is not None and tokens.grad.shape == (0, HIDDEN)


def test_chunks_are_sorted_as_megatron_sorts_them() -> None:
    rows, probs, sizes = torch.randn(6, HIDDEN), torch.rand(6), torch.tensor([1, 3, 0, 2])
    order = torch.tensor([2, 0, 3, 1])
    ours, theirs = (sort(rows, sizes, order, probs=probs) for sort in (sort_chunks, moe_utils.sort_chunks_by_idxs))
    assert not torch.equal(ours[0], rows)
    for x, y in zip(ours, theirs, strict=True):
        assert x is not None and torch.equal(x, y)


def test_chunks_in_order_are_not_copied() -> None:
    rows, probs, sizes = torch.randn(6, HIDDEN), torch.rand(6), torch.tensor([1, 3, 0, 2])
    assert sort_chunks(rows, sizes, torch.arange(4), probs=probs) == (rows, probs)
    assert sort_chunks(rows, sizes, torch.arange(4)) == (rows, None)


def test_sums_are_shaped_on_any_device() -> None:
    """A meta tensor runs no kernel and has no value to read."""
    out = unpermute(
        torch.empty(8, HIDDEN, device="meta"), torch.zeros(8, dtype=torch.int64, device="meta"), (4, HIDDEN)
    )
    assert out.shape == (4, HIDDEN) and out.dtype == torch.float32
