"""Processes over gloo run every case once. Used by test_ops_parallel.

    python gloo_cases.py RANK WORLD IMPLEMENTATION STORE OUT

Each case compares what this rank computes with the same operation on one rank, and raises where they differ.
OUT.RANK receives a JSON object: case → null, or its traceback.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron import ops

WORLD = int(sys.argv[2])
IMPLEMENTATION: Any = sys.argv[3]
token_logprobs = partial(ops.token_logprobs, implementation=IMPLEMENTATION)
linear_logprobs = partial(ops.linear_logprobs, implementation=IMPLEMENTATION)
sequence_policy_loss = partial(ops.sequence_policy_loss, implementation=IMPLEMENTATION)
sequence_mean = partial(ops.sequence_mean, implementation=IMPLEMENTATION)
Group = dist.ProcessGroup


def shards(columns: int, rank: int) -> slice:
    return slice(rank * columns // WORLD, (rank + 1) * columns // WORLD)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare_logits(rank: int, group: Group, logits: Tensor, targets: Tensor, vocab_size: int | None) -> None:
    """Value and gradient of both outputs, against the whole vocabulary on one rank."""
    upstream = torch.linspace(-1, 2, 2 * len(targets), dtype=torch.float64).view(2, -1)
    whole = logits.clone().requires_grad_()
    expected = token_logprobs(whole, targets, temperature=0.8, vocab_size=vocab_size)
    (expected_gradient,) = torch.autograd.grad(expected, whole, tuple(upstream))
    mine = shards(logits.shape[1], rank)
    for inplace in (False, True):
        part = logits[:, mine].clone().requires_grad_()
        actual = token_logprobs(
            part,
            targets,
            temperature=0.8,
            vocab_start=mine.start,
            vocab_size=vocab_size,
            group=group,
            inplace_backward=inplace,
        )
        (gradient,) = torch.autograd.grad(actual, part, tuple(upstream))
        close(actual[0], expected[0])
        close(actual[1], expected[1])
        close(gradient, expected_gradient[:, mine])


def token_logprobs_are_those_of_one_rank(rank: int, group: Group) -> None:
    logits = torch.randn(9, 16, generator=generator(), dtype=torch.float64) * 4
    compare_logits(rank, group, logits, torch.randint(16, (9,), generator=generator()), None)


def padding_across_the_shards(rank: int, group: Group) -> None:
    """Padding in the last shard only, up to it, and filling it: that rank has no column in the softmax."""
    logits = torch.randn(9, 16, generator=generator(), dtype=torch.float64) * 4
    for vocab_size in (15, 9, 8, 3):
        logits[:, vocab_size:] = math.nan
        targets = torch.randint(vocab_size, (9,), generator=generator())
        compare_logits(rank, group, logits.clone(), targets, vocab_size)


def minus_infinity_on_a_whole_shard(rank: int, group: Group) -> None:
    logits = torch.randn(4, 8, generator=generator(), dtype=torch.float64) - 300  # the shift is far below 0
    logits[0, :4], logits[1, 4:], logits[2, 1:] = -math.inf, -math.inf, -math.inf
    targets = torch.tensor([5, 0, 0, 7])
    compare_logits(rank, group, logits, targets, None)
    part = logits[:, shards(8, rank)].clone()
    part[3] = -math.inf
    logprobs, entropy = token_logprobs(part, targets, vocab_start=rank * 8 // WORLD, group=group)
    assert logprobs[:3].isfinite().all() and logprobs[3] == -math.inf and entropy.isfinite().all()


def targets_outside_the_vocabulary(rank: int, group: Group) -> None:
    part = torch.randn(4, 4, generator=generator(rank))
    logprobs, _ = token_logprobs(part, torch.tensor([-1, 7, 8, 3]), vocab_start=4 * rank, vocab_size=7, group=group)
    assert logprobs.isnan().tolist() == [True, True, True, False]


def ranks_agree_bitwise(rank: int, group: Group) -> None:
    """A clip decided differently on two tensor-parallel ranks would give them different losses."""
    part = torch.randn(64, 500, generator=generator(rank))
    targets = torch.randint(500 * WORLD, (64,), generator=generator())
    logprobs, entropy = token_logprobs(part, targets, vocab_start=500 * rank, group=group)
    for values in (logprobs, entropy):
        other = values.clone()
        dist.broadcast(other, src=0, group=group)
        assert torch.equal(values, other)


def linear_logprobs_reduce_the_hidden_gradient(rank: int, group: Group) -> None:
    hidden = torch.randn(7, 5, generator=generator(1), dtype=torch.float64)
    weight = torch.randn(12, 5, generator=generator(2), dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator(3))
    upstream = tuple(torch.randn(2, 7, generator=generator(4), dtype=torch.float64))
    mine = shards(12, rank)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = linear_logprobs(whole[0], whole[1], targets, temperature=1.4, vocab_size=11)
    expected_hidden, expected_weight = torch.autograd.grad(expected, whole, upstream)
    for reduce_hidden_grad in (True, False):
        part = [hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()]
        actual = linear_logprobs(
            part[0],
            part[1],
            targets,
            temperature=1.4,
            vocab_start=mine.start,
            vocab_size=11,
            group=group,
            reduce_hidden_grad=reduce_hidden_grad,
        )
        grad_hidden, grad_weight = torch.autograd.grad(actual, part, upstream)
        if not reduce_hidden_grad:
            assert (grad_hidden - expected_hidden).abs().max() > 1e-3  # this rank's part alone
            dist.all_reduce(grad_hidden, group=group)
        close(actual[0], expected[0])
        close(actual[1], expected[1])
        close(grad_hidden, expected_hidden)
        close(grad_weight, expected_weight[mine])


def float32_shards_with_rows_left_out_and_a_gradient_buffer(rank: int, group: Group) -> None:
    hidden = torch.randn(40, 16, generator=generator(1))
    weight = torch.randn(64, 16, generator=generator(2))
    targets = torch.randint(60, (40,), generator=generator(3))
    upstream = torch.randn(40, generator=generator(4)) * (torch.arange(40) % 3 > 0)
    whole = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected, _ = linear_logprobs(whole[0], whole[1], targets, vocab_size=60)
    expected_hidden, expected_weight = torch.autograd.grad(expected, whole, upstream.double())
    mine = shards(64, rank)
    leaves = [hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()]
    buffer = torch.ones(64 // WORLD, 16)
    actual, _ = linear_logprobs(
        leaves[0],
        leaves[1],
        targets,
        vocab_start=mine.start,
        vocab_size=60,
        group=group,
        weight_grad=buffer,
        skip_zero_rows=True,
    )
    (grad_hidden,) = torch.autograd.grad(actual, leaves[:1], upstream)
    close(actual.double(), expected, 2e-6)
    close(grad_hidden.double(), expected_hidden, 2e-6)
    close(buffer.double() - 1, expected_weight[mine], 2e-6)


def shards_that_start_elsewhere_are_refused(rank: int, group: Group) -> None:
    try:
        token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), vocab_start=4 * rank + 4, group=group)
    except ValueError as error:
        assert f"start at {4 * rank} here" in str(error)
    else:
        raise AssertionError("a shard that overlaps the next was taken")


RESPONSES = ["........xxxxxxxx", "....xxxx", "..........xxxx..xxxxxxxx", "........", "......xxxxxx..xx"]
LENGTHS = [len(text) for text in RESPONSES]
LOG_S = [2e-4, 6e-4, -5e-4, 0.0, 0.5]
ADVANTAGES = [1.0, 0.7, -1.2, 0.4, -0.6]


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, mask, cu_seqlens; sequence means of the log ratio are LOG_S."""
    mask = torch.tensor([c == "x" for text in RESPONSES for c in text])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    old = -torch.rand(mask.numel(), generator=generator(5), dtype=torch.float64)
    difference = torch.randn(mask.numel(), generator=generator(6), dtype=torch.float64) * 0.05
    for i, mean in enumerate(LOG_S):
        tokens = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        kept = difference[tokens][mask[tokens]]
        if kept.numel():
            difference[tokens] += mean - kept.mean()
    return old + difference, old, mask, cu_seqlens


def zigzag(cu_seqlens: Tensor, rank: int) -> Tensor:
    """Indices of a rank's tokens: each sequence in two chunks a rank, rank 0 holds the outer two."""
    parts = []
    for start, length in zip(cu_seqlens[:-1].tolist(), LENGTHS, strict=True):
        chunks = torch.arange(start, start + length).chunk(2 * WORLD)
        parts += [chunks[rank], chunks[2 * WORLD - 1 - rank]]
    return torch.cat(parts)


def pieces(cu_seqlens: Tensor, rank: int) -> Tensor:
    """Indices of a rank's tokens: one piece of each sequence."""
    starts = cu_seqlens[:-1].tolist()
    return torch.cat(
        [
            torch.arange(start + rank * length // WORLD, start + (rank + 1) * length // WORLD)
            for start, length in zip(starts, LENGTHS, strict=True)
        ]
    )


def compare_context_parallel(
    rank: int, group: Group, split: Callable[[Tensor, int], Tensor], level: str, per_token: bool, weighted: bool
) -> None:
    logprobs, old, mask, cu_seqlens = packed()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    if per_token:
        advantages = torch.randn(logprobs.numel(), generator=generator(7), dtype=torch.float64)
    weights = torch.rand(logprobs.numel(), generator=generator(8), dtype=torch.float64) if weighted else None
    clip = {"clip_low": 3e-4, "clip_high": 4e-4} if level == "sequence" else {"clip_low": 0.02, "clip_high": 0.027}
    settings: dict[str, Any] = {**clip, "dual_clip": 1.3, "num_sequences": 11, "level": level}

    whole = logprobs.clone().requires_grad_()
    expected, expected_stats = sequence_policy_loss(
        whole, old, mask, cu_seqlens, advantages, weights=weights, **settings
    )
    expected_mean = sequence_mean(whole.square(), mask, cu_seqlens, num_sequences=11)
    (expected_gradient,) = torch.autograd.grad(expected + 3 * expected_mean, whole)
    assert expected_stats.clipped.any() and not expected_stats.clipped.all()

    mine = split(cu_seqlens, rank)
    local = logprobs[mine].clone().requires_grad_()
    local_mask, local_cu = mask[mine], (cu_seqlens // WORLD).int()
    loss, stats = sequence_policy_loss(
        local,
        old[mine],
        local_mask,
        local_cu,
        advantages[mine] if per_token else advantages,
        weights=None if weights is None else weights[mine],
        cp_group=group,
        **settings,
    )
    mean = sequence_mean(local.square(), local_mask, local_cu, num_sequences=11, cp_group=group)
    (gradient,) = torch.autograd.grad(loss + 3 * mean, local)
    close(gradient, expected_gradient[mine])
    totals = torch.stack([loss.detach(), mean.detach()])
    dist.all_reduce(totals, group=group)  # the shares add up: no division by the ranks
    close(totals, torch.stack([expected, expected_mean]).detach())
    close(stats.log_ratio, expected_stats.log_ratio)
    assert torch.equal(stats.clipped, expected_stats.clipped)
    assert torch.equal(stats.clipped_tokens, expected_stats.clipped_tokens[mine])
    assert torch.equal(stats.num_response_tokens, expected_stats.num_response_tokens)


def context_parallel_gspo(rank: int, group: Group) -> None:
    compare_context_parallel(rank, group, zigzag, "sequence", per_token=False, weighted=False)


def context_parallel_gspo_weighted(rank: int, group: Group) -> None:
    compare_context_parallel(rank, group, zigzag, "sequence", per_token=False, weighted=True)


def context_parallel_gspo_token(rank: int, group: Group) -> None:
    compare_context_parallel(rank, group, zigzag, "sequence", per_token=True, weighted=False)


def context_parallel_grpo(rank: int, group: Group) -> None:
    compare_context_parallel(rank, group, zigzag, "token", per_token=False, weighted=True)


def context_parallel_pieces(rank: int, group: Group) -> None:
    compare_context_parallel(rank, group, pieces, "sequence", per_token=False, weighted=False)


def context_parallel_rank_without_response_tokens(rank: int, group: Group) -> None:
    """Long prompts leave a rank with prompt tokens alone (slime broke here): it must still run backward."""
    prompt = torch.full((6,), math.nan, dtype=torch.float64)
    response = torch.linspace(-1, -0.5, 6, dtype=torch.float64)
    has_response = rank == WORLD - 1
    logprobs = (response if has_response else prompt).clone().requires_grad_()
    mask = torch.full((6,), has_response)
    cu_seqlens = torch.tensor([0, 2, 6])
    loss, stats = sequence_policy_loss(
        logprobs,
        logprobs.detach() - 1e-4,
        mask,
        cu_seqlens,
        torch.tensor([1.0, -0.4], dtype=torch.float64),
        clip_low=3e-4,
        clip_high=4e-4,
        cp_group=group,
    )
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    close(total, torch.tensor(-0.5 * math.exp(1e-4) * (1.0 - 0.4), dtype=torch.float64))
    close(stats.log_ratio, torch.full((2,), 1e-4, dtype=torch.float64))
    assert stats.num_response_tokens.tolist() == [2, 4]
    assert logprobs.grad is not None
    assert (
        (logprobs.grad != 0).all() if has_response else torch.equal(logprobs.grad, torch.zeros(6, dtype=torch.float64))
    )


def tensor_and_context_parallel(rank: int, group: Group) -> None:
    """From hidden states to the loss on 2 × 2 ranks; with two ranks the context-parallel groups have one."""
    tensor_size, context_size = 2, WORLD // 2
    tensor_rank, context_rank = rank % 2, rank // 2
    tensor_groups = [dist.new_group([2 * c, 2 * c + 1]) for c in range(context_size)]
    context_groups = [dist.new_group(list(range(t, WORLD, 2))) for t in range(tensor_size)]
    _, old, mask, cu_seqlens = packed()
    tokens = mask.numel()
    hidden = torch.randn(tokens, 5, generator=generator(9), dtype=torch.float64)
    weight = torch.randn(8, 5, generator=generator(10), dtype=torch.float64)
    targets = torch.randint(7, (tokens,), generator=generator(11))
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    clip = {"clip_low": 0.2, "clip_high": 0.2}

    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logprobs, entropy = linear_logprobs(whole[0], whole[1], targets, vocab_size=7)
    old = logprobs.detach() - old / 10
    expected, expected_stats = sequence_policy_loss(logprobs, old, mask, cu_seqlens, advantages, **clip)
    expected_total = expected - 0.1 * sequence_mean(entropy, mask, cu_seqlens)
    expected_hidden, expected_weight = torch.autograd.grad(expected_total, whole)

    mine = torch.cat(
        [
            torch.arange(start + context_rank * n // context_size, start + (context_rank + 1) * n // context_size)
            for start, n in zip(cu_seqlens[:-1].tolist(), LENGTHS, strict=True)
        ]
    )
    columns = slice(4 * tensor_rank, 4 * tensor_rank + 4)
    part = [hidden[mine].clone().requires_grad_(), weight[columns].clone().requires_grad_()]
    local_cu, cp_group = cu_seqlens // context_size, context_groups[tensor_rank]
    logprobs, entropy = linear_logprobs(
        part[0], part[1], targets[mine], vocab_start=columns.start, vocab_size=7, group=tensor_groups[context_rank]
    )
    loss, stats = sequence_policy_loss(logprobs, old[mine], mask[mine], local_cu, advantages, cp_group=cp_group, **clip)
    total = loss - 0.1 * sequence_mean(entropy, mask[mine], local_cu, cp_group=cp_group)
    grad_hidden, grad_weight = torch.autograd.grad(total, part)
    dist.all_reduce(grad_weight, group=cp_group)
    close(grad_hidden, expected_hidden[mine])
    close(grad_weight, expected_weight[columns])
    close(stats.log_ratio, expected_stats.log_ratio)


CASES: list[Callable[[int, Group], None]] = [
    token_logprobs_are_those_of_one_rank,
    padding_across_the_shards,
    minus_infinity_on_a_whole_shard,
    targets_outside_the_vocabulary,
    ranks_agree_bitwise,
    linear_logprobs_reduce_the_hidden_gradient,
    float32_shards_with_rows_left_out_and_a_gradient_buffer,
    shards_that_start_elsewhere_are_refused,
    context_parallel_gspo,
    context_parallel_gspo_weighted,
    context_parallel_gspo_token,
    context_parallel_grpo,
    context_parallel_pieces,
    context_parallel_rank_without_response_tokens,
    tensor_and_context_parallel,
]


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    group = dist.new_group(range(WORLD))
    results: dict[str, str | None] = {case.__name__: "not run: an earlier case failed" for case in CASES}
    try:
        for case in CASES:
            case(rank, group)
            results[case.__name__] = None
    except Exception:  # reported by the test of this case; leaving ends the other rank's wait, too
        results[case.__name__] = traceback.format_exc()
    Path(f"{out}.{rank}").write_text(json.dumps(results))
    os._exit(0)  # threads of open groups may abort an interpreter that winds down


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[4], sys.argv[5])
