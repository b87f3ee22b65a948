"""Figures of an evaluation, against brute force."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config import EvalConfig, ModelConfig, RolloutConfig, RunConfig, TaskConfig, TrainConfig
from gspo_megatron.evaluate import EvalResult, evaluate, summarize
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import Job
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport

scores = st.sampled_from([0.0, 0.5, 0.99, 1.0])
maybe_scores = st.one_of(scores, st.none())


def pass_at_by_enumeration(samples: list[float], k: int) -> float:
    """Share of the k-subsets of the samples that hold a correct one."""
    subsets = list(itertools.combinations(samples, k))
    return sum(any(r >= 1.0 for r in subset) for subset in subsets) / len(subsets)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(maybe_scores, min_size=1, max_size=6), min_size=1, max_size=6))
def test_every_figure_equals_brute_force(rewards: list[list[float | None]]) -> None:
    scored = [kept for samples in rewards if (kept := [r for r in samples if r is not None])]
    if not scored:
        with pytest.raises(RuntimeError, match="not one held-out response could be scored"):
            summarize(rewards)
        return
    result = summarize(rewards)
    means = [statistics.fmean(s) for s in scored]
    assert result.mean == pytest.approx(statistics.fmean(means))
    if len(means) > 1:
        assert result.ci95 == pytest.approx(1.96 * statistics.stdev(means) / math.sqrt(len(means)))
    assert result.num_prompts == len(scored)
    assert result.num_failed == sum(r is None for samples in rewards for r in samples)
    assert result.num_samples == max(len(s) for s in rewards)
    fewest = min(len(s) for s in scored)
    assert list(result.pass_at) == [k for k in (1, 2, 4) if k <= fewest]
    for k, value in result.pass_at.items():
        assert value == pytest.approx(statistics.fmean([pass_at_by_enumeration(s, k) for s in scored]))


def test_missing_rewards_count_in_no_mean() -> None:
    result = summarize([[1.0, None], [None, None], [0.0, 1.0]])
    assert result.mean == pytest.approx((1.0 + 0.5) / 2)
    assert (result.num_prompts, result.num_samples, result.num_failed) == (2, 2, 3)
    assert result.pass_at == {1: pytest.approx(0.75)}, "one prompt has a single scored sample: no pass@2"


def test_partial_credit_is_no_pass() -> None:
    result = summarize([[0.9, 0.9, 0.9, 0.9]])
    assert result.pass_at == {1: 0.0, 2: 0.0, 4: 0.0} and result.mean == pytest.approx(0.9)
    assert summarize([[1 - 1e-7]]).pass_at == {1: 1.0}, "a sum of float32 weights may miss 1"


def test_pass_at_k_is_reported_for_powers_of_two() -> None:
    assert list(summarize([[1.0] * 7]).pass_at) == [1, 2, 4]
    assert list(summarize([[1.0] * 8]).pass_at) == [1, 2, 4, 8]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Over many evaluations of 60 prompts with two samples and a known mean."""
    import random

    draw = random.Random(1)
    covered = 0
    for _ in range(600):
        rates = [draw.random() for _ in range(60)]
        result = summarize([[float(draw.random() < rate) for _ in range(2)] for rate in rates])
        covered += abs(result.mean - 0.5) <= result.ci95
    assert 0.92 < covered / 600 < 0.98


def test_one_prompt_has_no_interval() -> None:
    assert math.isnan(summarize([[1.0, 0.0]]).ci95), "±0 would be a claim of certainty"


def test_prompts_that_agree_have_an_interval_of_zero() -> None:
    assert summarize([[1.0], [1.0], [1.0]]).ci95 == 0.0


def test_the_line_for_people_names_what_was_not_scored() -> None:
    text = str(EvalResult(0.5, 0.1, {1: 0.5, 2: 0.75}, 32, 2, 3))
    assert text == "held-out avg@2 0.500 ± 0.100 (95 %), pass@1 0.500, pass@2 0.750, 32 prompts, 3 not scored"
    assert "not scored" not in str(EvalResult(0.5, 0.1, {1: 0.5}, 32, 1, 0))


class MarkedTask:
    """Prompts that say which split they are of."""

    def __init__(self) -> None:
        self.splits: list[str] = []

    def prompts(self, split: str, start: int, count: int) -> list[Prompt]:
        self.splits.append(split)
        return [Prompt(i, f"{split} {i}", [i], None) for i in range(start, start + count)]


class RecordingEngine:
    """Answers every prompt with one token, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], SamplingParams]] = []

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]:
        self.asked.append(([p.text for p in prompts], params))
        answer = torch.tensor([0, 1])
        rollout = Rollout(0, answer, answer == 1, torch.zeros(2), torch.tensor([-1, 0]), "stop")
        return [Group(p, [rollout] * params.num_samples) for p in prompts]


class EvenScorer:
    """Rewards the prompts with an even number."""

    def score(self, groups: list[Group]) -> tuple[list[Group], ScoreReport]:
        scored = [
            replace(g, rollouts=[replace(r, reward=float(g.prompt.id % 2 == 0)) for r in g.rollouts]) for g in groups
        ]
        return scored, ScoreReport(num_scored=sum(len(g.rollouts) for g in groups))


class StopAtNine:
    stop_token_ids = (9,)


class ReplicaJob(Job):
    """A replica whose records meet those of the replicas that ran before it."""

    records: list[Any]

    def all_gather(self, record: Any) -> list[Any]:
        self.records.append(record)
        return list(self.records)


def test_evaluation_samples_the_heldout_split_as_eval_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="unused"),
        rollout=RolloutConfig(prompts_per_batch=6, samples_per_prompt=2, temperature=0.9, max_response_tokens=7),
        eval=EvalConfig(prompts=5, samples=3, temperature=0.5),
    )
    monkeypatch.setattr(ReplicaJob, "records", [], raising=False)
    task, engines, results = MarkedTask(), [RecordingEngine(), RecordingEngine()], []
    for rank, engine in enumerate(engines):
        group: Any = None  # evaluation communicates through the job alone
        groups = ProcessGroups(ParallelLayout(data=2), rank, *[group] * 10)
        tokenizer: Any = StopAtNine()
        fakes: dict[str, Any] = {"task": task, "scorer": EvenScorer(), "engine": engine}
        job = ReplicaJob(config=config, groups=groups, tokenizer=tokenizer, device=torch.device("cpu"), **fakes)
        results.append(evaluate(job))

    assert set(task.splits) == {"heldout"}
    [(first, first_params)], [(second, second_params)] = engines[0].asked, engines[1].asked
    assert first and second and not set(first) & set(second)
    assert sorted(first + second) == [f"heldout {i}" for i in range(5)]
    for params in (first_params, second_params):
        assert (params.temperature, params.num_samples, params.max_response_tokens) == (0.5, 3, 7)
        assert params.stop_token_ids == (9,)
    assert first_params.seed != second_params.seed, "replicas draw their own samples"
    assert results[1].mean == pytest.approx(3 / 5)
    assert (results[1].num_prompts, results[1].num_samples, results[1].num_failed) == (5, 3, 0)
