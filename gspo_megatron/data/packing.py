"""Which sequence goes into which micro-batch of which data-parallel rank. Pure: lengths in, indices out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from gspo_megatron.errors import UserError


@dataclass(frozen=True)
class PackingPlan:
    """Sequence positions, [data-parallel rank][micro-batch][…]; as many micro-batches on every rank."""

    assignment: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.assignment[0])


def plan_packing(lengths: Sequence[int], *, data_parallel: int, token_budget: int, multiple_of: int = 1) -> PackingPlan:
    """Balance sequences over data-parallel ranks, then over each rank's micro-batches.

    Longest first, each to the place with the fewest tokens so far. Every rank gets the same number of
    micro-batches, a multiple of `multiple_of`, none above `token_budget`; some may be empty. Depends on nothing
    but the arguments, so every rank computes the same plan.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise UserError(
            f"a sequence of {longest} tokens exceeds data.token_budget={token_budget}; raise it to at least {longest}"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = _spread(order, lengths, data_parallel)
    count = max(1, *(-(-sum(lengths[i] for i in mine) // token_budget) for mine in per_rank))
    count = -(-count // multiple_of) * multiple_of
    while True:
        packed = [_spread(mine, lengths, count) for mine in per_rank]
        if all(sum(lengths[i] for i in micro) <= token_budget for rank in packed for micro in rank):
            return PackingPlan(tuple(tuple(tuple(sorted(micro)) for micro in rank) for rank in packed))
        count += multiple_of


def _spread(order: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Greedy longest-processing-time assignment; ties by bin number."""
    heap = [(0, b) for b in range(bins)]
    result: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        load, b = heapq.heappop(heap)
        result[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return result
