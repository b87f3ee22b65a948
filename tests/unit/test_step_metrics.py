"""A batch's figures: the same however its sequences are packed and spread over ranks, and equal to a definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo_megatron import algorithms
from gspo_megatron.algorithms import Algorithm, Mismatch
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.data.micro_batch import pack
from gspo_megatron.data.packing import plan_packing
from gspo_megatron.experience import Experience
from gspo_megatron.metrics import METRICS
from gspo_megatron.policy.router import RouterLosses
from gspo_megatron.step_metrics import (
    MicroStats,
    RankRecord,
    observed_loss,
    record,
    router_losses,
    routing_replayed,
    summarize,
)
from gspo_megatron.types import FinishReason, Group, MicroBatch, Prompt, Rollout, ScoreReport
from gspo_megatron.types import Sequence as TrainSequence

CPU = torch.device("cpu")
LENGTHS = [9, 14, 3, 21, 11, 2, 17, 5, 4, 10, 26, 7]  # of both mini-batches, prompt and response
PROMPT = 1
FULLY_MASKED = (4, 9)
# Every branch of the clip: above and below with either sign, inside, and without an advantage.
ADVANTAGES = [1.0, -0.7, -1.2, 0.9, 0.5, -0.5, 0.0, 0.8, -0.3, 1.3, 0.6, -1.1]
DRIFT = [6e-3, 7e-3, -5e-3, -6e-3, 0.0, 1e-3, 9e-3, 2e-3, -8e-3, 0.0, 5e-3, -1e-3]  # about each sequence's log s
MINI_BATCHES = 2
EMPTY = Experience([], [], [], ScoreReport(), 0)

CONFIGS = {
    "gspo": AlgorithmConfig(name="gspo", clip_low=3e-3, clip_high=4e-3, mini_batches=MINI_BATCHES),
    "grpo": AlgorithmConfig(name="grpo", clip_low=0.02, clip_high=0.03, mini_batches=MINI_BATCHES),
    "gspo_token": AlgorithmConfig(name="gspo_token", clip_low=3e-3, clip_high=4e-3, mini_batches=MINI_BATCHES),
    "gspo_kl": AlgorithmConfig(clip_low=3e-3, clip_high=4e-3, mini_batches=MINI_BATCHES, kl_coefficient=0.1),
}


def noise(index: int, length: int, what: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * what + index))


def sequence(index: int, *, per_token: bool = False) -> TrainSequence:
    length = LENGTHS[index]
    mask = torch.arange(length) >= PROMPT
    if length > 10:
        mask[length // 2] = False  # a hole in the middle
    if index in FULLY_MASKED:
        mask[:] = False
    advantage = torch.tensor(ADVANTAGES[index])
    advantages = advantage + 0.3 * noise(index, length, 7) if per_token else advantage
    return TrainSequence(index, torch.arange(length) + 2, mask, -2 + 0.1 * noise(index, length, 2), advantages)


def token_values(index: int) -> dict[str, Tensor]:
    """[L] of each token: the trainer's old and new log-probabilities and its entropy. A function of the sequence."""
    length = LENGTHS[index]
    old = -2 + 0.1 * noise(index, length, 2) + 0.01 * noise(index, length, 3)
    mask = sequence(index).response_mask
    wobble = 0.02 * noise(index, length, 4)
    new = old + DRIFT[index] + wobble - wobble[mask].sum() / max(1, int(mask.sum()))
    return {"old": old, "new": new, "entropy": 1 + noise(index, length, 6).abs()}


def run_micro(
    algorithm: Algorithm, sequences: Sequence[TrainSequence], multiple_of: int, outside: float, num_sequences: int
) -> MicroStats:
    """The loss of one micro-batch; `outside` stands wherever the mask is False."""
    micro = pack(sequences, tensor_parallel=multiple_of, pad_token_id=0, device=CPU)
    columns = {name: torch.full((micro.num_tokens,), outside) for name in ("old", "new", "entropy")}
    for s, start in zip(sequences, micro.cu_seqlens.tolist(), strict=False):
        for name, value in token_values(s.index).items():
            columns[name][start : start + len(value) - 1] = value[1:]
    columns = {name: torch.where(micro.response_mask, value, outside) for name, value in columns.items()}
    micro.old_logprobs = columns["old"]
    if algorithm.needs_reference:
        micro.reference_logprobs = columns["old"] - 0.05
    micro.rollout_logprobs = torch.where(micro.response_mask, micro.rollout_logprobs, outside)
    loss = observed_loss(algorithm, Mismatch(), num_sequences=num_sequences)
    _, stats = loss(columns["new"].requires_grad_(), columns["entropy"], micro)
    assert isinstance(stats, MicroStats)
    assert not any(value.requires_grad for value in vars(stats).values())
    return stats


def rank_records(
    name: str, *, ranks: int, budget: int, multiple_of: int = 1, outside: float = 0.0, groups: bool = True
) -> list[RankRecord]:
    """Records of a job whose last pipeline stage is on `ranks` replicas, plus one rank that reports nothing."""
    algorithm = algorithms.build(CONFIGS[name])
    size = len(LENGTHS) // MINI_BATCHES
    reports: list[list[list[MicroStats]]] = [[] for _ in range(ranks)]
    for j in range(MINI_BATCHES):
        plan = plan_packing(LENGTHS[j * size : (j + 1) * size], data_parallel=ranks, token_budget=budget)
        for rank, micros in enumerate(plan.assignment):
            reports[rank].append(
                [
                    run_micro(
                        algorithm,
                        [sequence(j * size + i, per_token=name == "gspo_token") for i in micro],
                        multiple_of,
                        outside,
                        size,
                    )
                    for micro in micros
                ]
            )
    shares = [experience(range(r, 3, ranks)) if groups else EMPTY for r in range(ranks)]
    made = [
        record(report, share, padding=(1, 4), engine_bytes=24) for report, share in zip(reports, shares, strict=True)
    ]
    return [*made, record([[], []], EMPTY, padding=(1, 4), engine_bytes=0)]


REWARDS: list[list[float | None]] = [[1.0, 0.0, None, 0.5], [1.0, 1.0, 1.0, 1.0], [None, None, None, None]]


def experience(numbers: Any) -> Experience:
    """Scored groups of three prompts; the third prompt's scorer failed altogether."""
    groups = []
    for n in numbers:
        rollouts = []
        for i, reward in enumerate(REWARDS[n]):
            length = 3 + n + i
            reason: FinishReason = "length" if i == 3 else "stop"
            rollouts.append(
                Rollout(
                    n,
                    torch.arange(length),
                    torch.arange(length) >= 2,
                    torch.zeros(length),
                    torch.zeros(length, dtype=torch.int32),
                    reason,
                    reward,
                )
            )
        groups.append(Group(Prompt(n, "", [0, 1], None), rollouts))
    failed, late = sum(4 * (g.prompt.id == 2) for g in groups), sum(g.prompt.id == 0 for g in groups)
    return Experience(groups, [], [], ScoreReport(num_failed=failed, num_timed_out=late), 3)


def assert_same_row(row: dict[str, Any], other: dict[str, Any]) -> None:
    assert row.keys() == other.keys()
    for key, value in row.items():
        if key.endswith("_length_slope"):
            assert value is other[key] is None, "too few sequences"
            continue
        assert value is not None
        # The loss is float32 where it is summed over sequences of one micro-batch; all else is summed in float64.
        assert other[key] == pytest.approx(value, rel=1e-5 if key == "loss" else 1e-9, abs=1e-7), key


SPREADS = [(1, 26, 1), (1, 40, 4), (2, 26, 2), (2, 200, 8), (4, 26, 1), (4, 60, 4), (8, 30, 2)]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("ranks", "budget", "multiple_of"), SPREADS)
def test_the_row_is_the_same_in_every_layout(name: str, ranks: int, budget: int, multiple_of: int) -> None:
    """Eight ranks for six sequences: some hold padding alone."""
    whole = summarize(rank_records(name, ranks=1, budget=10_000))
    assert_same_row(whole, summarize(rank_records(name, ranks=ranks, budget=budget, multiple_of=multiple_of)))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("outside", [math.nan, math.inf, 1e30])
def test_what_stands_under_the_mask_shows_nowhere(name: str, outside: float) -> None:
    clean = summarize(rank_records(name, ranks=2, budget=40, multiple_of=4))
    assert_same_row(clean, summarize(rank_records(name, ranks=2, budget=40, multiple_of=4, outside=outside)))


def concatenated(what: str) -> Tensor:
    """[response tokens of the batch] of one quantity, in float64."""
    return torch.cat([token_values(i)[what].double()[sequence(i).response_mask] for i in range(len(LENGTHS))])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_figure_equals_its_definition(name: str) -> None:
    row = summarize(rank_records(name, ranks=2, budget=40, multiple_of=4))
    old, new = concatenated("old"), concatenated("new")
    engine = torch.cat([sequence(i).rollout_logprobs.double()[sequence(i).response_mask] for i in range(len(LENGTHS))])
    gap = old - engine
    assert row["entropy"] == pytest.approx(float(concatenated("entropy").mean()), rel=1e-6)
    assert row["kl_rollout_trainer"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3)
    assert row["sync_probe_max_abs"] == pytest.approx(float(gap.abs().max()), rel=1e-4)
    assert row["token_ratio_max"] == pytest.approx(float((new - old).max().exp()), rel=1e-5)

    real = [i for i in range(len(LENGTHS)) if i not in FULLY_MASKED]
    log_s = []
    for i in real:
        values = token_values(i)
        log_s.append(float((values["new"] - values["old"]).double()[sequence(i).response_mask].mean()))
    assert row["log_ratio_sequence_max_abs"] == pytest.approx(max(map(abs, log_s)), rel=1e-4)
    for key, q in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        assert row[f"log_ratio_sequence_{key}"] == pytest.approx(float(np.quantile(log_s, q)), abs=1e-6)
    in_first = [abs(x) for i, x in zip(real, log_s, strict=True) if i < 6]
    assert row["old_logprob_gap_first_mini_batch"] == pytest.approx(max(in_first), rel=1e-4)

    kl = []
    for i in real:
        values, mask = token_values(i), sequence(i).response_mask
        d = (values["new"].double() - values["old"].double() + 0.05)[mask]
        kl.append(float((torch.exp(-d) - 1 + d).mean()))
    expected_kl = sum(kl) / len(LENGTHS)  # N counts the fully masked ones; both mini-batches are equally large
    assert row.get("kl_reference") == (pytest.approx(expected_kl, rel=1e-4) if name == "gspo_kl" else None)

    if name == "gspo":
        low, high = math.log(1 - 3e-3), math.log(1 + 4e-3)
        advantage = {i: float(sequence(i).advantages) for i in real}
        clipped = {
            i: (x > high and advantage[i] > 0) or (x < low and advantage[i] < 0)
            for i, x in zip(real, log_s, strict=True)
        }
        live = [i for i in real if advantage[i] != 0]
        up, down = [i for i in live if advantage[i] > 0], [i for i in live if advantage[i] < 0]
        tokens = {i: int(sequence(i).response_mask.sum()) for i in real}
        assert 0 < sum(clipped[i] for i in up) < len(up) and 0 < sum(clipped[i] for i in down) < len(down)
        assert row["clip_fraction_sequence"] == pytest.approx(sum(clipped[i] for i in live) / len(live))
        assert row["clip_fraction_positive"] == pytest.approx(sum(clipped[i] for i in up) / len(up))
        assert row["clip_fraction_negative"] == pytest.approx(sum(clipped[i] for i in down) / len(down))
        assert row["clip_fraction_token"] == pytest.approx(
            sum(tokens[i] for i in live if clipped[i]) / sum(tokens[i] for i in live)
        )
        losses = []
        for j in range(MINI_BATCHES):
            terms = []
            for i, x in zip(real, log_s, strict=True):
                if i // 6 == j:
                    s, a = math.exp(x), advantage[i]
                    terms.append(-min(s * a, min(max(s, 1 - 3e-3), 1 + 4e-3) * a))
            losses.append(sum(terms) / 6)  # N counts the fully masked ones
        assert row["loss"] == pytest.approx(sum(losses) / MINI_BATCHES, abs=1e-6)


def test_the_largest_token_ratio_may_be_below_one() -> None:
    """A masked entry is no ratio of 1."""
    algorithm = algorithms.build(CONFIGS["gspo"])
    s = sequence(0)
    micro = pack([s], tensor_parallel=4, pad_token_id=0, device=CPU)
    micro.old_logprobs = micro.rollout_logprobs.clone()
    loss = observed_loss(algorithm, Mismatch(), num_sequences=1)
    _, stats = loss(micro.old_logprobs - 0.25, torch.ones(micro.num_tokens), micro)
    row = summarize([record([[stats]], experience([0]), padding=(0, 4), engine_bytes=0)])
    assert row["token_ratio_max"] == pytest.approx(math.exp(-0.25))


def test_padding_is_no_sequence() -> None:
    [made, _] = rank_records("gspo", ranks=1, budget=30, multiple_of=8)
    for j, part in enumerate(made.sequences):
        assert sorted(part["sequence_ids"]) == list(range(6 * j, 6 * j + 6))
        assert all(len(values) == 6 for values in part.values())
        masked = [n == 0 for n in part["num_tokens"]]
        assert masked == [i in FULLY_MASKED for i in part["sequence_ids"]]


def test_advantages_that_vary_by_token_are_reported_as_their_mean() -> None:
    [made, _] = rank_records("gspo_token", ranks=1, budget=30)
    for part in made.sequences:
        for index, value in zip(part["sequence_ids"], part["advantages"], strict=True):
            s = sequence(int(index), per_token=True)
            kept = s.advantages[s.response_mask]
            assert value == pytest.approx(float(kept.mean()) if kept.numel() else 0.0, abs=1e-6)


def test_rewards_lengths_and_failures_come_from_the_heads() -> None:
    row = summarize(rank_records("gspo", ranks=2, budget=40))
    scored = [r for samples in REWARDS for r in samples if r is not None]
    assert row["reward_mean"] == pytest.approx(np.mean(scored))
    assert row["reward_std"] == pytest.approx(np.std(scored))
    lengths = [1 + n + i for n in range(3) for i in range(4)]
    assert row["response_length_mean"] == pytest.approx(np.mean(lengths))
    assert row["response_tokens"] == sum(lengths)
    assert row["truncated_fraction"] == pytest.approx(3 / 12)
    assert row["zero_variance_group_fraction"] == pytest.approx(2 / 3), "all equal, and none scored"
    assert (row["num_failed_rewards"], row["num_timed_out_rewards"]) == (4, 1)
    assert row["reshard_bytes"] == 24
    assert row["padding_fraction"] == 0.25


def test_what_was_not_measured_is_absent_never_zero() -> None:
    """Every response masked and no reward: nothing but counts is known."""
    algorithm = algorithms.build(CONFIGS["gspo"])
    masked = [replace(sequence(i), response_mask=torch.zeros(LENGTHS[i], dtype=torch.bool)) for i in range(3)]
    stats = run_micro(algorithm, masked, 4, math.nan, 3)
    row = summarize([record([[stats]], experience([2]), padding=(0, 4), engine_bytes=0)])
    unmeasured = [
        "entropy",
        "kl_rollout_trainer",
        "token_ratio_max",
        "sync_probe_max_abs",
        "old_logprob_gap_first_mini_batch",
        "reward_mean",
        "reward_std",
        "clip_fraction_token",
        "clip_fraction_sequence",
        "clip_fraction_positive",
        "clip_fraction_negative",
        "log_ratio_sequence_p50",
        "log_ratio_sequence_max_abs",
        "log_ratio_sequence_std",
        "log_weight_sequence_std",
        "ess_fraction_sequence",
        "ess_fraction_weight",
        "kl_staleness",
        "kl_total_k1",
    ]
    assert {key: row.get(key) for key in unmeasured} == dict.fromkeys(unmeasured)
    assert row["loss"] == 0.0


def test_a_nan_in_a_response_is_seen() -> None:
    """The other side of ignoring what is masked: a broken model must not look well."""
    algorithm = algorithms.build(CONFIGS["gspo"])
    micro: MicroBatch = pack([sequence(0), sequence(1)], pad_token_id=0, device=CPU)
    micro.old_logprobs = micro.rollout_logprobs.clone()
    new = micro.old_logprobs.clone()
    new[int(micro.response_mask.nonzero()[2])] = math.nan
    _, stats = observed_loss(algorithm, Mismatch(), num_sequences=2)(new, new.clone(), micro)
    row = summarize([record([[stats]], experience([0]), padding=(0, 4), engine_bytes=0)])
    for key in ("loss", "entropy", "token_ratio_max", "log_ratio_sequence_max_abs"):
        value = row[key]
        assert value is not None and math.isnan(value), key


def test_router_losses_are_means_over_optimizer_steps() -> None:
    steps = [RouterLosses(1.25, None), RouterLosses(1.75, None)]
    assert router_losses(steps) == {"router_aux_loss": 1.5, "router_z_loss": None}
    assert router_losses([RouterLosses(None, 3.0)]) == {"router_aux_loss": None, "router_z_loss": 3.0}
    assert router_losses(steps).keys() <= METRICS.keys()


def test_the_share_of_replayed_routes_is_a_mean_over_optimizer_steps() -> None:
    assert routing_replayed([0.5, 1.0]) == {"routing_replayed_fraction": 0.75}
    assert routing_replayed([None, None]) == {"routing_replayed_fraction": None}
    assert routing_replayed([]).keys() <= METRICS.keys()


def test_every_key_of_the_row_is_a_known_metric() -> None:
    row = summarize(rank_records("gspo", ranks=1, budget=100))
    assert row.keys() - METRICS.keys() == {"response_tokens"}, "the recorder turns it into rollout_tokens_per_s"
