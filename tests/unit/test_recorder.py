"""Which rollouts of a batch end in samples.jsonl."""

from __future__ import annotations

from gspo_megatron.recorder import choose


def test_the_best_the_worst_and_the_longest_come_first() -> None:
    rewards = [0.5, 0.2, None, 0.9, 0.4, -0.1]
    lengths = [3, 4, 9, 5, 2, 6]
    assert choose(rewards, lengths, 3) == [3, 5, 2]
    assert choose(rewards, lengths, 5) == [3, 5, 2, 0, 1]
    assert choose(rewards, lengths, 100) == [3, 5, 2, 0, 1, 4]


def test_without_a_reward_the_longest_comes_first() -> None:
    assert choose([None, None, None], [1, 5, 2], 2) == [1, 0]
    assert choose([1.0], [4], 4) == [0]


def test_nothing_is_chosen_of_nothing_or_where_nothing_is_wanted() -> None:
    assert choose([], [], 4) == []
    assert choose([1.0, 0.0], [4, 5], 0) == []
