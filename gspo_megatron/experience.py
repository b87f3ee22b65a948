"""From prompts to scored groups to sequences with advantages: this replica's share of a rollout batch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.config import TrainConfig
from gspo_megatron.job import Job
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.types import Group, Rollout, ScoreReport, Sequence
from gspo_megatron.weight_sync import Restore, generate


@dataclass(frozen=True)
class Experience:
    """One rollout batch on one rank: nothing but the report's zeros away from the heads."""

    groups: list[Group]  # scored
    sequences: list[Sequence]  # numbered over the whole batch
    advantages: list[list[float | None]]  # per group, per rollout; None for one that trains nothing
    score: ScoreReport
    next_prompt: int  # where the next batch starts in the task's order


def collect(
    job: Job, algorithm: Algorithm, *, batch: int, first_prompt: int, restore: Restore | None = None
) -> Experience:
    """Generate, score and weigh one rollout batch. Collective over all ranks; for `restore` see `generate`."""
    config = job.config
    assert isinstance(config, TrainConfig)
    wanted = config.rollout.prompts_per_batch
    rounds = config.algorithm.dynamic_sampling_max_rounds if algorithm.dynamic_sampling else 1
    groups: list[Group] = []
    report = ScoreReport()
    for number in range(rounds):
        drawn, score = _generate(job, wanted, first_prompt, seed=batch * rounds + number, restore=restore)
        groups, report = groups + drawn, _add(report, score)
        first_prompt += wanted
        if rounds > 1 and sum(job.all_gather(sum(_differ(g, config) for g in groups))) >= wanted:
            break
    chosen = _choose(job, groups, wanted) if rounds > 1 else None
    if chosen is not None:
        groups = [g for g in groups if g.prompt.id in chosen]
        places = {prompt_id: i for i, prompt_id in enumerate(chosen)}
    else:
        places = {g.prompt.id: g.prompt.id - (first_prompt - wanted) for g in groups}
    sequences, advantages = [], []
    for group in groups:
        values = _advantages(group, algorithm, config)
        advantages.append(
            [float(v.mean()) if _trains(r, config) else None for r, v in zip(group.rollouts, values, strict=True)]
        )
        for i, (rollout, value) in enumerate(zip(group.rollouts, values, strict=True)):
            index = places[group.prompt.id] * config.rollout.samples_per_prompt + i
            sequences.append(_sequence(index, rollout, value, config))
    return Experience(groups, sequences, advantages, report, first_prompt)


def _generate(
    job: Job, count: int, first_prompt: int, *, seed: int, restore: Restore | None
) -> tuple[list[Group], ScoreReport]:
    config = job.config
    assert isinstance(config, TrainConfig)
    mine = []
    if job.groups.is_head:
        prompts = job.task.prompts("train", first_prompt, count)
        mine = [prompts[i] for i in job.share(count)]
    params = SamplingParams(
        num_samples=config.rollout.samples_per_prompt,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        stop_token_ids=job.tokenizer.stop_token_ids,
        seed=(config.run.seed * 1_000_003 + seed) * job.groups.layout.data + job.groups.coordinates.data,
        routes=config.returns_routes,
    )
    generated = generate(job, mine, params, restore)
    if job.scorer is None:
        return [], ScoreReport()
    groups, report = job.scorer.score(generated)
    return [replace(g, rollouts=[_judge(r, config) for r in g.rollouts]) for g in groups], report


def _judge(rollout: Rollout, config: TrainConfig) -> Rollout:
    """The reward of a truncated response under rollout.truncated = "zero"."""
    if rollout.finish_reason == "length" and config.rollout.truncated == "zero" and rollout.reward is not None:
        return replace(rollout, reward=0.0)
    return rollout


def _rewards(group: Group, config: TrainConfig) -> torch.Tensor:
    """[G] rewards; NaN for rollouts that the group's statistics leave out."""
    drop = config.rollout.truncated == "drop"
    return torch.tensor(
        [
            float("nan") if r.reward is None or (drop and r.finish_reason == "length") else r.reward
            for r in group.rollouts
        ]
    )


def _differ(group: Group, config: TrainConfig) -> bool:
    return bool(Algorithm.is_informative(_rewards(group, config)))


def _choose(job: Job, groups: SequenceOf[Group], wanted: int) -> list[int]:
    """Prompt ids of the batch, in order: groups whose rewards differ first, then others to fill it."""
    config = job.config
    assert isinstance(config, TrainConfig)
    mine = [(not _differ(g, config), g.prompt.id) for g in groups]
    marked = sorted(pair for part in job.all_gather(mine) for pair in part)
    return sorted(prompt_id for _, prompt_id in marked[:wanted])


def _advantages(group: Group, algorithm: Algorithm, config: TrainConfig) -> list[torch.Tensor]:
    """One advantage per rollout, a scalar or one per token."""
    values = algorithm.advantages(_rewards(group, config))
    if config.algorithm.shuffle_advantages:
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + group.prompt.id)
        values = values[torch.randperm(len(values), generator=generator)]
    return list(values)


def _trains(rollout: Rollout, config: TrainConfig) -> bool:
    """False without a reward, or truncated under "mask" or "drop"; such a rollout stays counted in N."""
    return rollout.reward is not None and not (
        rollout.finish_reason == "length" and config.rollout.truncated in ("mask", "drop")
    )


def _sequence(index: int, rollout: Rollout, advantage: torch.Tensor, config: TrainConfig) -> Sequence:
    return Sequence(
        index=index,
        token_ids=rollout.token_ids,
        response_mask=rollout.response_mask & _trains(rollout, config),
        rollout_logprobs=rollout.rollout_logprobs,
        advantages=advantage,
        routes=rollout.routes,
        routes_valid=rollout.routes_valid,
    )


def _add(a: ScoreReport, b: ScoreReport) -> ScoreReport:
    return ScoreReport(
        a.num_scored + b.num_scored,
        a.num_failed + b.num_failed,
        a.num_timed_out + b.num_timed_out,
        a.first_error or b.first_error,
    )
