"""Attention over two ranks of a context-parallel group is attention over one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.attention_cases import GROUPS, HEAD_DIM, HEADS, dense_gradients, random_qkv, real_tokens
from tests.distributed.rank_pool import RankPool

LENGTHS = [8, 4, 20, 4, 12]
Ranks = Callable[[int], RankPool]


def run(ranks: Ranks, size: int, case: str, **kwargs: Any) -> list[dict[str, Any]]:
    return ranks(size).run(f"tests.distributed.attention_cases:{case}", layout={"context": size}, **kwargs)


def whole(parts: list[dict[str, Any]]) -> list[Tensor]:
    """The ranks' results in the order of the pack."""
    order = torch.cat([part["held"] for part in parts]).argsort()
    return [torch.cat(shares)[order] for shares in zip(*(part["results"] for part in parts), strict=True)]


@pytest.mark.parametrize("size", [1, 2])
def test_output_and_gradients_equal_the_definition(size: int, ranks: Ranks) -> None:
    ours = whole(run(ranks, size, "attention", lengths=LENGTHS))
    truth = dense_gradients(random_qkv(LENGTHS, HEADS, GROUPS, HEAD_DIM), LENGTHS, HEAD_DIM**-0.5)
    for name, x, y in zip(["out", "query", "key", "value"], ours, truth, strict=True):
        assert y.abs().max() > 0.5
        assert (x - y).abs().max() <= 1e-5, name


def test_two_ranks_equal_one(ranks: Ranks) -> None:
    two, one = (whole(run(ranks, size, "attention", lengths=LENGTHS)) for size in (2, 1))
    for x, y in zip(two, one, strict=True):
        assert (x - y).abs().max() <= 1e-5


@pytest.mark.parametrize(("lengths", "num_real"), [([8], [2]), ([8, 4], [1, 0]), ([4], [0])])
def test_a_rank_of_padding_goes_backward_too(lengths: list[int], num_real: list[int], ranks: Ranks) -> None:
    """The middle chunks of a sequence are rank 1's: padding alone, if the real tokens end before them."""
    parts = run(ranks, 2, "attention", lengths=lengths, num_real=num_real)
    assert parts[1]["num_real"] == 0 and parts[0]["num_real"] == sum(num_real)
    *inputs, upstream = random_qkv(lengths, HEADS, GROUPS, HEAD_DIM)
    upstream = upstream * real_tokens(lengths, num_real)[:, None, None]
    for x, y in zip(whole(parts), dense_gradients([*inputs, upstream], lengths, HEAD_DIM**-0.5), strict=True):
        assert (x - y).abs().max() <= 1e-5


def test_gradients_of_bf16_keys_are_summed_in_float32(ranks: Ranks) -> None:
    """256 + 3·½ is 258 rounded once to bfloat16, 256 rounded after each addition."""
    first, second = ranks(2).run("tests.distributed.attention_cases:bf16_gradient_sum", layout={"context": 2})
    assert first == [258.0, 0.5]  # tokens 0 and 3: seen by all four segments, and by the last
    assert second == [1.5, 1.0]  # tokens 1 and 2


def test_rotary_positions_and_recomputation_in_megatrons_layer(ranks: Ranks) -> None:
    results = {
        (size, recompute): run(ranks, size, "self_attention", lengths=LENGTHS, recompute=recompute)
        for size in (1, 2)
        for recompute in (False, True)
    }
    for (_, recompute), parts in results.items():
        for part in parts:  # without the graph first, with it in backward
            assert part["calls"] == ([False, True] if recompute else [True])
    truth = results[1, False]
    for parts in results.values():
        for x, y in zip(whole(parts), whole(truth), strict=True):
            assert y.abs().max() > 0.5
            assert (x - y).norm() <= 2e-6 * y.norm()
        for name, y in truth[0]["weights"].items():
            x = sum(part["weights"][name] for part in parts)
            assert (x - y).norm() <= 2e-6 * y.norm(), name
