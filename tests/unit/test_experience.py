"""From prompts to sequences with advantages, with an engine and a scorer whose answers are tables."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from gspo_megatron import algorithms
from gspo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.experience import Experience, collect
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import Job
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.types import FinishReason, Group, NamedTensor, Prompt, Rollout, ScoreReport

Rewards = Callable[[int, int], float | None]  # (prompt id, number of the sample)
G = 4


class Meeting:
    """all_gather between threads that stand for ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.records: list[Any] = [None] * size

    def exchange(self, rank: int, record: Any) -> list[Any]:
        self.records[rank] = record
        self.barrier.wait()
        everyone = list(self.records)
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class ThreadJob(Job):
    """A job whose collectives meet in memory."""

    meeting: Meeting

    def all_gather(self, record: Any) -> list[Any]:
        return [r for r in self.meeting.exchange(self.groups.rank, record) if r is not None]


class CountingTask:
    """Prompt n has n % 3 + 1 tokens."""

    name = "counting"
    isolated = None

    def prompts(self, split: str, start: int, count: int) -> list[Prompt]:
        assert split == "train"
        return [Prompt(i, f"prompt {i}", [7] * (i % 3 + 1), None) for i in range(start, start + count)]

    def answer(self, prompt: Prompt) -> str:
        raise NotImplementedError

    def score(self, prompt: Prompt, response_text: str) -> float:
        raise NotImplementedError


@dataclass
class StopTokens:
    stop_token_ids: tuple[int, ...] = (1,)


@dataclass
class TableEngine:
    """Sample s of prompt p is s + 1 tokens 100·p + s; the tables say which are cut."""

    truncated: Callable[[int, int], bool] = lambda prompt, sample: False
    calls: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    name = "table"
    version = 0

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]:
        self.calls.append(([p.id for p in prompts], params))
        return [Group(p, [self._rollout(p, s) for s in range(params.num_samples)]) for p in prompts]

    def _rollout(self, prompt: Prompt, sample: int) -> Rollout:
        start, length = len(prompt.token_ids), len(prompt.token_ids) + sample + 1
        mask = torch.arange(length) >= start
        reason: FinishReason = "length" if self.truncated(prompt.id, sample) else "stop"
        return Rollout(
            prompt_id=prompt.id,
            token_ids=torch.where(mask, 100 * prompt.id + sample, 7),
            response_mask=mask,
            rollout_logprobs=torch.where(mask, -0.5 * (sample + 1), 0.0),
            policy_versions=torch.where(mask, 0, -1).int(),
            finish_reason=reason,
        )

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: Sequence[NamedTensor]) -> None: ...

    def end_update(self) -> None: ...


@dataclass
class TableScorer:
    """Rewards of a table; None is a scorer that failed, or took too long for odd prompts."""

    rewards: Rewards

    def score(self, groups: list[Group]) -> tuple[list[Group], ScoreReport]:
        scored = [
            replace(g, rollouts=[replace(r, reward=self.rewards(g.prompt.id, s)) for s, r in enumerate(g.rollouts)])
            for g in groups
        ]
        missing = [g.prompt.id for g in scored for r in g.rollouts if r.reward is None]
        late = sum(i % 2 for i in missing)
        total = sum(len(g.rollouts) for g in groups)
        error = f"prompt {missing[0]}" if missing else None
        return scored, ScoreReport(total - len(missing), len(missing) - late, late, error)


def settings(prompts: int = 6, *, truncated: str = "score", seed: int = 0, **algorithm: Any) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder="unused", seed=seed),
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="counting"),
        algorithm=AlgorithmConfig(**algorithm),
        rollout=RolloutConfig(
            prompts_per_batch=prompts,
            samples_per_prompt=G,
            temperature=0.8,
            max_response_tokens=9,
            truncated=truncated,  # type: ignore[arg-type]
        ),
    )


@dataclass
class Ranks:
    """What every rank made of a batch, and the engines of the heads."""

    experiences: list[Experience]
    engines: list[TableEngine | None]

    @property
    def sequences(self) -> dict[int, Any]:
        return {s.index: s for e in self.experiences for s in e.sequences}

    @property
    def groups(self) -> dict[int, Group]:
        return {g.prompt.id: g for e in self.experiences for g in e.groups}

    @property
    def advantages(self) -> dict[int, list[float | None]]:
        return {g.prompt.id: a for e in self.experiences for g, a in zip(e.groups, e.advantages, strict=True)}


def run(
    config: TrainConfig,
    rewards: Rewards,
    *,
    layout: ParallelLayout | None = None,
    truncated: Callable[[int, int], bool] = lambda prompt, sample: False,
    batch: int = 1,
    first_prompt: int = 0,
) -> Ranks:
    """`collect` on every rank of the layout, each a thread."""
    layout = layout or ParallelLayout()
    meeting = Meeting(layout.world_size)
    jobs = []
    for rank in range(layout.world_size):
        groups = ProcessGroups(layout, rank, *([None] * 10))  # type: ignore[arg-type]
        engine = TableEngine(truncated) if groups.is_head else None
        scorer = TableScorer(rewards) if groups.is_head else None
        jobs.append(
            ThreadJob(config, groups, StopTokens(), CountingTask(), scorer, engine, torch.device("cpu"), meeting)  # type: ignore[arg-type]
        )
    algorithm = algorithms.build(config.algorithm)
    with ThreadPoolExecutor(layout.world_size) as pool:
        futures = [pool.submit(collect, job, algorithm, batch=batch, first_prompt=first_prompt) for job in jobs]
        return Ranks([f.result() for f in futures], [job.engine for job in jobs])  # type: ignore[misc]


def by_sample(prompt: int, sample: int) -> float:
    """Another reward for every sample of every prompt."""
    return (3 * prompt + 2 * sample) % 7 / 7


def expected_advantages(rewards: Sequence[float]) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    return ((values - values.mean()) / (values.std() + 1e-6)).tolist()


LAYOUTS = [ParallelLayout(), ParallelLayout(data=2), ParallelLayout(tensor=2, data=3), ParallelLayout(pipeline=2)]


# --- one batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.describe)
def test_the_batch_is_the_same_in_every_layout(layout: ParallelLayout) -> None:
    ranks = run(settings(), by_sample, layout=layout, first_prompt=12)
    assert sorted(ranks.groups) == list(range(12, 18))
    assert sorted(s.index for e in ranks.experiences for s in e.sequences) == list(range(6 * G))
    for index, s in ranks.sequences.items():
        prompt, sample = 12 + index // G, index % G
        wanted = expected_advantages([by_sample(prompt, i) for i in range(G)])
        assert float(s.advantages) == pytest.approx(wanted[sample], abs=1e-6)
        assert s.token_ids[s.response_mask].tolist() == [100 * prompt + sample] * (sample + 1)
        assert s.rollout_logprobs[s.response_mask].tolist() == [-0.5 * (sample + 1)] * (sample + 1)
        assert not s.response_mask[: prompt % 3 + 1].any()
    for prompt, values in ranks.advantages.items():
        assert values == [float(ranks.sequences[(prompt - 12) * G + i].advantages) for i in range(G)]
    assert {e.next_prompt for e in ranks.experiences} == {18}


def test_ranks_that_are_no_heads_have_nothing() -> None:
    ranks = run(settings(), by_sample, layout=ParallelLayout(tensor=2, data=2))
    assert [engine is not None for engine in ranks.engines] == [True, False, True, False]
    for rank in (1, 3):
        e = ranks.experiences[rank]
        assert (e.groups, e.sequences, e.advantages, e.score) == ([], [], [], ScoreReport())


def test_the_engine_is_asked_with_the_settings_and_seeds_of_its_own() -> None:
    seeds = []
    for seed in (0, 1):
        for batch in (1, 2):
            ranks = run(settings(seed=seed), by_sample, layout=ParallelLayout(data=3), batch=batch)
            engines = [e for e in ranks.engines if e is not None]
            assert [e.calls[0][0] for e in engines] == [[0, 3], [1, 4], [2, 5]]
            seeds += [params.seed for e in engines for _, params in e.calls]
            params = engines[0].calls[0][1]
            assert params == SamplingParams(G, 0.8, 9, (1,), params.seed)
    assert len(set(seeds)) == len(seeds) == 12, "no two heads, batches or runs draw the same random numbers"


def test_the_same_call_gives_the_same_batch() -> None:
    first, again = (run(settings(), by_sample, layout=ParallelLayout(data=2), batch=3) for _ in range(2))
    assert [e.calls for e in first.engines if e] == [e.calls for e in again.engines if e]
    assert first.advantages == again.advantages


# --- truncated responses and failed scorers ----------------------------------------------------------------------

REWARDS = [1.0, 0.0, 0.25, 0.75]


def cut_the_last(prompt: int, sample: int) -> bool:
    return sample == 3


@pytest.mark.parametrize(
    ("policy", "reward", "statistics", "trains"),
    [
        ("score", 0.75, [1.0, 0.0, 0.25, 0.75], True),
        ("zero", 0.0, [1.0, 0.0, 0.25, 0.0], True),
        ("mask", 0.75, [1.0, 0.0, 0.25, 0.75], False),
        ("drop", 0.75, [1.0, 0.0, 0.25], False),
    ],
)
def test_what_a_truncated_response_counts_for(
    policy: str, reward: float, statistics: list[float], trains: bool
) -> None:
    ranks = run(settings(2, truncated=policy), lambda p, s: REWARDS[s], truncated=cut_the_last)
    sequences = ranks.sequences
    assert sorted(sequences) == list(range(2 * G)), "N does not change"
    wanted = expected_advantages(statistics)
    for prompt in range(2):
        group = [sequences[prompt * G + i] for i in range(G)]
        got = [float(s.advantages) for s in group]
        assert got[: len(wanted)] == pytest.approx(wanted, abs=1e-6)
        assert policy != "drop" or got[3] == 0.0
        assert [bool(s.response_mask.any()) for s in group] == [True, True, True, trains]
        assert ranks.groups[prompt].rollouts[3].reward == reward
        assert ranks.groups[prompt].rollouts[3].response_mask.any(), "the rollout itself keeps its response"
        assert (ranks.advantages[prompt][3] is None) is not trains


@pytest.mark.parametrize("policy", ["score", "zero", "mask", "drop"])
def test_a_group_of_truncated_responses_keeps_its_place(policy: str) -> None:
    ranks = run(settings(2, truncated=policy), lambda p, s: REWARDS[s], truncated=lambda p, s: p == 0)
    assert sorted(ranks.sequences) == list(range(2 * G))
    advantages = [float(ranks.sequences[i].advantages) for i in range(G)]
    if policy in ("zero", "drop"):
        assert advantages == [0.0] * G
    else:
        assert advantages == pytest.approx(expected_advantages(REWARDS), abs=1e-6)


@pytest.mark.parametrize("policy", ["score", "zero", "mask", "drop"])
def test_a_failed_scorer_is_no_zero(policy: str) -> None:
    """The response without reward is left out of the statistics, masked, and still counted in N."""
    ranks = run(
        settings(3, truncated=policy),
        lambda p, s: None if (p, s) in ((1, 2), (2, 0)) else REWARDS[s],
        truncated=lambda p, s: (p, s) == (1, 2),  # truncated and failed: "zero" gives it no reward either
        layout=ParallelLayout(data=3),
    )
    assert sorted(ranks.sequences) == list(range(3 * G))
    for prompt, failed in ((1, 2), (2, 0)):
        s = ranks.sequences[prompt * G + failed]
        assert float(s.advantages) == 0.0 and not s.response_mask.any()
        assert ranks.advantages[prompt][failed] is None
        assert ranks.groups[prompt].rollouts[failed].reward is None
        others = [i for i in range(G) if i != failed]
        wanted = expected_advantages([REWARDS[i] for i in others])
        assert [float(ranks.sequences[prompt * G + i].advantages) for i in others] == pytest.approx(wanted, abs=1e-6)
    score = ScoreReport(
        sum(e.score.num_scored for e in ranks.experiences),
        sum(e.score.num_failed for e in ranks.experiences),
        sum(e.score.num_timed_out for e in ranks.experiences),
    )
    assert score == ScoreReport(10, 1, 1)


# --- shuffled advantages -----------------------------------------------------------------------------------------


def test_shuffling_permutes_within_each_group_only() -> None:
    plain = run(settings(30), by_sample)
    shuffled = run(settings(30, shuffle_advantages=True), by_sample)
    moved = 0
    for prompt, values in plain.advantages.items():
        permuted = shuffled.advantages[prompt]
        assert sorted(permuted) == sorted(values)  # type: ignore[type-var]
        moved += permuted != values
    assert moved > 20, "24 permutations leave few groups as they were"
    assert {tuple(r.reward for r in g.rollouts) for g in plain.groups.values()} == {
        tuple(r.reward for r in g.rollouts) for g in shuffled.groups.values()
    }


def test_the_permutation_is_the_same_in_every_layout_and_differs_by_seed() -> None:
    one, four = (
        run(settings(12, shuffle_advantages=True), by_sample, layout=ParallelLayout(data=d)).advantages for d in (1, 4)
    )
    assert one == four
    assert run(settings(12, shuffle_advantages=True, seed=1), by_sample).advantages != one


# --- dynamic sampling --------------------------------------------------------------------------------------------


def informative(ids: set[int]) -> Rewards:
    """Groups of these prompts differ in their rewards; all others are solved by every sample."""
    return lambda prompt, sample: float(sample == 0) if prompt in ids else 1.0


def asked(ranks: Ranks) -> list[int]:
    return sorted(i for e in ranks.engines if e is not None for ids, _ in e.calls for i in ids)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.describe)
def test_groups_with_equal_rewards_are_replaced_by_further_prompts(layout: ParallelLayout) -> None:
    good = {1, 4, 6, 7, 8, 10, 11, 13}
    ranks = run(settings(6, dynamic_sampling=True), informative(good), layout=layout)
    assert sorted(ranks.groups) == [1, 4, 6, 7, 8, 10], "the first six in the task's order"
    assert asked(ranks) == list(range(12)), "two rounds sufficed"
    assert {e.next_prompt for e in ranks.experiences} == {12}
    assert sorted(ranks.sequences) == list(range(6 * G))
    for place, prompt in enumerate(sorted(ranks.groups)):
        for i in range(G):
            s = ranks.sequences[place * G + i]
            assert s.token_ids[-1] == 100 * prompt + i
    assert all(any(a) for a in ranks.advantages.values())


def test_one_round_is_enough_where_every_group_is_informative() -> None:
    ranks = run(settings(6, dynamic_sampling=True), informative(set(range(20))), first_prompt=3)
    assert asked(ranks) == list(range(3, 9)) and ranks.experiences[0].next_prompt == 9
    assert sorted(ranks.groups) == list(range(3, 9))


@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.describe)
def test_after_the_last_round_others_fill_the_batch(layout: ParallelLayout) -> None:
    config = settings(6, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    ranks = run(config, informative({5, 16}), layout=layout)
    assert asked(ranks) == list(range(18))
    assert {e.next_prompt for e in ranks.experiences} == {18}
    assert sorted(ranks.groups) == [0, 1, 2, 3, 5, 16], "both that differ, then the earliest others"
    assert sorted(ranks.sequences) == list(range(6 * G))
    assert sorted(p for p, a in ranks.advantages.items() if any(a)) == [5, 16]


def test_every_round_draws_with_a_seed_of_its_own() -> None:
    config = settings(6, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    seeds = []
    for batch in (1, 2, 3):
        ranks = run(config, informative(set()), layout=ParallelLayout(data=2), batch=batch)
        seeds += [params.seed for e in ranks.engines if e for _, params in e.calls]
    assert len(seeds) == 18 and len(set(seeds)) == 18


def test_the_scorers_failures_of_all_rounds_are_counted() -> None:
    def rewards(prompt: int, sample: int) -> float | None:
        return None if (prompt, sample) == (2, 1) else informative(set(range(6, 12)))(prompt, sample)

    ranks = run(settings(6, dynamic_sampling=True), rewards)
    assert ranks.experiences[0].score == ScoreReport(12 * G - 1, 1, 0, "prompt 2")
    assert sorted(ranks.groups) == list(range(6, 12))


def test_what_the_statistics_leave_out_makes_no_group_informative() -> None:
    """Under "drop" the only response that differs is truncated; a failed one differs from nothing."""
    config = settings(2, truncated="drop", dynamic_sampling=True, dynamic_sampling_max_rounds=2)

    def rewards(prompt: int, sample: int) -> float | None:
        if prompt < 2:
            return float(sample == 3) if prompt == 0 else (None if sample == 3 else 1.0)
        return float(sample == 0)

    ranks = run(config, rewards, truncated=cut_the_last)
    assert sorted(ranks.groups) == [2, 3]


def test_one_round_at_most_is_no_dynamic_sampling() -> None:
    config = settings(6, dynamic_sampling=True, dynamic_sampling_max_rounds=1)
    ranks = run(config, informative({0}))
    assert sorted(ranks.groups) == list(range(6)) and ranks.experiences[0].next_prompt == 6
