"""Attention with sinks and windows: the definition, and the flash kernel's formulas with a stand-in for the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.policy import sink_attention
from gspo_megatron.policy.attention import AttentionPlan
from gspo_megatron.policy.sink_attention import FlashWithSinks, attend_with_sinks, visible
from tests.distributed.attention_cases import random_qkv
from tests.unit.policy.test_attention import plans

SCALE = 0.4
LENGTHS = [5, 1, 9, 14]
WINDOWS = [None, 1, 4, 100]


def leaves(heads: int, groups: int) -> tuple[list[Tensor], Tensor]:
    """query, key, value, sinks, and the output's gradient; float64."""
    query, key, value, upstream = (x.double() for x in random_qkv(LENGTHS, heads, groups, 8))
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [x.requires_grad_() for x in (query, key, value, sinks)], upstream


@pytest.mark.parametrize("window", WINDOWS)
def test_the_definition_is_the_softmax_with_one_more_number(window: int | None) -> None:
    """Token by token, each query with the keys that it sees."""
    (query, key, value, sinks), _ = leaves(4, 2)
    [plan] = plans(LENGTHS, 1)
    out = attend_with_sinks(query, key, value, sinks, plan, scale=SCALE, window=window)
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    for start, length in zip(starts.tolist(), LENGTHS, strict=True):
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            seen = slice(start + first, start + t + 1)
            for head in range(4):
                scores = key[seen, head // 2] @ query[start + t, head] * SCALE
                weights = scores.exp() / (sinks[head].exp() + scores.exp().sum())
                torch.testing.assert_close(out[start + t, head], weights @ value[seen, head // 2])


def test_what_a_query_sees() -> None:
    assert visible(2, 4, 2, torch.device("cpu")).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(2, 4, None, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def pieces(cu_seqlens: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    return [list(x.split(cu_seqlens.diff().tolist())) for x in tensors]


def forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *flags: Any, **how: Any
) -> tuple[Tensor, ...]:
    """What flash attention computes: output [T, heads, d] and log-sum-exp [heads, T]."""
    assert flags == (0.0, False, False) and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    outs, sums = [], []
    for a, b, c in zip(pieces(cu_q, q)[0], *pieces(cu_k, k, v), strict=True):
        scores = _scores(a, b, how)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), _repeated(c, a)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def backward_kernel(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *flags: Any,
    **how: Any,
) -> tuple[Tensor, ...]:
    """Its backward pass, from the output and log-sum-exp that it is given (FlashAttention-2, arXiv 2307.08691)."""
    assert flags[:2] == (0.0, False)
    grads: list[list[Tensor]] = [[], [], []]
    parts = (*pieces(cu_q, gradient, q, out, lse.T), *pieces(cu_k, k, v))
    for g, a, o, s, b, c in zip(*parts, strict=True):
        weights = (_scores(a, b, how) - s.T[..., None]).exp()
        by_value = torch.einsum("qhd,khd->hqk", g, _repeated(c, a)) - (g * o).sum(-1).T[..., None]
        by_score = weights * by_value * how["scale"]
        groups = b.shape[1]
        grads[0].append(torch.einsum("hqk,khd->qhd", by_score, _repeated(b, a)))
        grads[1].append(torch.einsum("hqk,qhd->khd", by_score, a).unflatten(1, (groups, -1)).sum(2))
        grads[2].append(torch.einsum("hqk,qhd->khd", weights, g).unflatten(1, (groups, -1)).sum(2))
    return tuple(torch.cat(x) for x in grads)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, how: dict[str, Any]) -> Tensor:
    left, right = how["window_size_left"], how["window_size_right"]
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    seen = (distance >= -right) & ((distance <= left) | (left < 0))
    return (torch.einsum("qhd,khd->hqk", q, _repeated(k, q)) * how["scale"]).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3)])
def test_the_flash_kernels_path_is_the_definition(
    heads: int, groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_attention, "flash_forward", forward_kernel)
    monkeypatch.setattr(sink_attention, "flash_backward", backward_kernel)
    inputs, upstream = leaves(heads, groups)
    [plan] = plans(LENGTHS, 1)
    expected = attend_with_sinks(*inputs, plan, scale=SCALE, window=window)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    out = FlashWithSinks.apply(*inputs, plan, SCALE, window)
    ours = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(out, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [2, 4])
def test_segments_of_context_parallel_ranks(size: int) -> None:
    """The second half of each rank's queries has more keys than queries; windows reach over chunks."""
    (query, key, value, sinks), _ = leaves(4, 2)
    lengths = [8, 16]
    query, key, value = query[:24], key[:24], value[:24]
    [whole] = plans(lengths, 1)
    expected = attend_with_sinks(query, key, value, sinks, whole, scale=SCALE, window=3)
    for rank, plan in enumerate(plans(lengths, size)):
        _check_rank(rank, size, plan, lengths, (query, key, value, sinks), expected)


def _check_rank(
    rank: int, size: int, plan: AttentionPlan, lengths: list[int], tensors: tuple[Tensor, ...], expected: Tensor
) -> None:
    from tests.distributed.attention_cases import held_by

    query, key, value, sinks = tensors
    held = [held_by(r, size, lengths) for r in range(size)]
    assert plan.key_index is not None
    keys, values = (x[torch.cat(held)][plan.key_index] for x in (key, value))
    out = attend_with_sinks(query[held[rank]], keys, values, sinks, plan, scale=SCALE, window=3)
    torch.testing.assert_close(out, expected[held[rank]])
