"""The packing plan: lengths in, indices out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.packing import PackingPlan, plan_packing
from gspo_megatron.errors import UserError

lengths_of = st.lists(st.integers(1, 60), max_size=60)


def load(micro: tuple[int, ...], lengths: list[int]) -> int:
    return sum(lengths[i] for i in micro)


@settings(max_examples=300, deadline=None)
@given(lengths_of, st.integers(1, 8), st.integers(0, 200))
def test_every_sequence_is_placed_once_within_the_budget(lengths: list[int], ranks: int, room: int) -> None:
    budget = max(lengths, default=1) + room
    plan = plan_packing(lengths, data_parallel=ranks, token_budget=budget)
    assert len(plan.assignment) == ranks
    assert sorted(i for rank in plan.assignment for micro in rank for i in micro) == list(range(len(lengths)))
    assert {len(rank) for rank in plan.assignment} == {plan.num_micro_batches}, "as many micro-batches on every rank"
    assert plan.num_micro_batches >= 1
    for rank in plan.assignment:
        for micro in rank:
            assert load(micro, lengths) <= budget
            assert list(micro) == sorted(micro)
    assert plan_packing(list(lengths), data_parallel=ranks, token_budget=budget) == plan


@settings(max_examples=300, deadline=None)
@given(lengths_of, st.integers(1, 8), st.integers(0, 200))
def test_ranks_and_micro_batches_differ_by_at_most_one_longest_sequence(
    lengths: list[int], ranks: int, room: int
) -> None:
    longest = max(lengths, default=0)
    plan = plan_packing(lengths, data_parallel=ranks, token_budget=max(longest, 1) + room)
    totals = [sum(load(micro, lengths) for micro in rank) for rank in plan.assignment]
    assert max(totals) - min(totals) <= longest
    for rank in plan.assignment:
        loads = [load(micro, lengths) for micro in rank]
        mine = [lengths[i] for micro in rank for i in micro]
        assert max(loads) - min(loads) <= max(mine, default=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 4))
def test_a_budget_for_everything_gives_one_micro_batch(lengths: list[int], ranks: int) -> None:
    plan = plan_packing(lengths, data_parallel=ranks, token_budget=sum(lengths))
    assert plan.num_micro_batches == 1


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(1, 4), st.integers(0, 60), st.integers(1, 4))
def test_the_number_of_micro_batches_is_a_multiple(lengths: list[int], ranks: int, room: int, multiple: int) -> None:
    budget = max(lengths, default=1) + room
    plan = plan_packing(lengths, data_parallel=ranks, token_budget=budget, multiple_of=multiple)
    free = plan_packing(lengths, data_parallel=ranks, token_budget=budget)
    assert plan.num_micro_batches % multiple == 0
    assert plan.num_micro_batches >= free.num_micro_batches
    if free.num_micro_batches % multiple == 0:
        assert plan == free
    assert sorted(i for rank in plan.assignment for micro in rank for i in micro) == list(range(len(lengths)))
    assert all(load(micro, lengths) <= budget for rank in plan.assignment for micro in rank)


def test_few_micro_batches_are_used() -> None:
    plan = plan_packing([10] * 32, data_parallel=2, token_budget=40)
    assert plan.num_micro_batches == 4
    assert all(len(micro) == 4 for rank in plan.assignment for micro in rank)


def test_more_ranks_than_sequences_leave_ranks_with_an_empty_micro_batch() -> None:
    plan = plan_packing([5, 9], data_parallel=4, token_budget=9)
    assert plan == PackingPlan((((1,),), ((0,),), ((),), ((),)))


def test_no_sequences_at_all_still_give_every_rank_a_micro_batch() -> None:
    assert plan_packing([], data_parallel=3, token_budget=8) == PackingPlan((((),), ((),), ((),)))


def test_a_sequence_above_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError) as error:
        plan_packing([3, 17, 16], data_parallel=2, token_budget=16)
    assert str(error.value) == ("a sequence of 17 tokens exceeds data.token_budget=16; raise it to at least 17")
    assert plan_packing([3, 17, 16], data_parallel=2, token_budget=17).num_micro_batches >= 1


def test_the_plan_depends_on_lengths_only_through_their_order() -> None:
    """Ties go by index, so that equal lengths are placed the same on every rank and in every run."""
    plan = plan_packing([4, 4, 4, 4], data_parallel=2, token_budget=8)
    assert plan.assignment == (((0, 2),), ((1, 3),))
