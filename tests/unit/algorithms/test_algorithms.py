"""Registry, defaults, refusals and warnings, advantages, and each algorithm's loss."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.algorithms import ALGORITHMS, Algorithm, build, mismatch_of, resolve, warnings
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.errors import UserError
from gspo_megatron.ops import sequence_policy_loss
from gspo_megatron.types import MicroBatch

NAN = math.nan


def make_batch(*, per_token: bool = False, seed: int = 0) -> tuple[Tensor, MicroBatch]:
    """Log-probs and a batch of four sequences, the third without response tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([c == "x" for c in "..xx.x" + "x" + "..." + ".xxxx"])
    cu_seqlens = torch.tensor([0, 6, 7, 10, 15], dtype=torch.int32)
    tokens = mask.numel()
    old = -torch.rand(tokens, generator=generator)
    logprobs = old + torch.randn(tokens, generator=generator) * 0.3
    batch = MicroBatch(
        token_ids=torch.zeros(tokens, dtype=torch.long),
        targets=torch.zeros(tokens, dtype=torch.long),
        positions=torch.arange(tokens),
        cu_seqlens=cu_seqlens,
        sequence_ids=torch.arange(4),
        lengths=torch.tensor([6, 1, 3, 5]),
        response_mask=mask,
        rollout_logprobs=old.clone(),
        advantages=torch.randn(tokens if per_token else 4, generator=generator),
        max_seqlen=6,
        num_padding_tokens=0,
        old_logprobs=old,
    )
    return logprobs, batch


def test_registered_names_are_the_classes_own() -> None:
    assert {name: kind.name for name, kind in ALGORITHMS.items()} == {name: name for name in ALGORITHMS}


def test_fields_are_those_of_the_config() -> None:
    names = {f.name for f in fields(AlgorithmConfig)}
    for kind in ALGORITHMS.values():
        assert {f.name for f in fields(kind)} - {"implementation"} <= names


@pytest.mark.parametrize(
    ("name", "clip_low", "clip_high"), [("gspo", 3e-4, 4e-4), ("gspo_token", 3e-4, 4e-4), ("grpo", 0.2, 0.27)]
)
def test_defaults_are_the_papers(name: str, clip_low: float, clip_high: float) -> None:
    algorithm = build(AlgorithmConfig(name=name))
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.mini_batches) == (clip_low, clip_high, 4)
    assert algorithm.kl_coefficient == algorithm.entropy_coefficient == 0 and algorithm.dual_clip is None
    assert algorithm.normalize_std and not algorithm.dynamic_sampling and not algorithm.needs_reference
    assert warnings(AlgorithmConfig(name=name), algorithm) == []


def test_given_settings_override_the_defaults_zero_and_false_too() -> None:
    given_settings: dict[str, Any] = {
        "clip_low": 0.01,
        "clip_high": 0.02,
        "dual_clip": 1.2,
        "kl_coefficient": 0.1,
        "entropy_coefficient": 0.0,
        "normalize_std": False,
        "mini_batches": 2,
        "dynamic_sampling": True,
    }
    assert set(given_settings) == {f.name for f in fields(ALGORITHMS["gspo"])} - {"implementation"}
    algorithm = build(AlgorithmConfig(**given_settings))
    assert {name: getattr(algorithm, name) for name in given_settings} == given_settings
    assert algorithm.needs_reference


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r'algorithm.name="gspo_tokens" is unknown.*Did you mean "gspo_token"\?'):
        build(AlgorithmConfig(name="gspo_tokens"))


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
@pytest.mark.parametrize("clip", [{"clip_low": 0.2}, {"clip_high": 0.05}, {"clip_low": 0.2, "clip_high": 0.27}])
def test_grpos_clip_under_gspo_is_refused(name: str, clip: dict[str, Any]) -> None:
    """TRL, verl, slime, NeMo-RL, swift, ROLL and AReaL default to 0.2 under GSPO, which then never clips."""
    with pytest.raises(UserError) as error:
        build(AlgorithmConfig(name=name, **clip))
    message = str(error.value)
    assert all(f"algorithm.{key}={value:g}" in message for key, value in clip.items())
    for part in ("3e-4", "4e-4", "GRPO's clip of 0.2 never clips", "algorithm.allow_unusual_clip=true"):
        assert part in message

    allowed = AlgorithmConfig(name=name, allow_unusual_clip=True, **clip)
    algorithm = build(allowed)
    assert [w for w in warnings(allowed, algorithm) if "never clips" in w]


def test_a_clip_for_short_responses_is_accepted() -> None:
    config = AlgorithmConfig(clip_low=0.03, clip_high=0.04)
    assert warnings(config, build(config)) == []


@pytest.mark.parametrize(
    ("name", "other", "reason", "own"),
    [
        ("gspo", "token_mean", "weight it by length", "sequence_mean"),
        ("gspo_token", "token_mean", "weight it by length", "sequence_mean"),
        ("grpo", "token_mean", "no other is built", "sequence_mean"),
        ("gspo", "token_sum", "no other is built", "sequence_mean"),
        ("cispo", "sequence_mean", "no other is built", "token_mean"),
        ("luspo", "token_mean", "no other is built", "token_sum"),
    ],
)
def test_another_aggregation_is_refused(name: str, other: Any, reason: str, own: Any) -> None:
    with pytest.raises(UserError, match=f'aggregation="{other}".*{reason}.*Use "{own}"'):
        build(AlgorithmConfig(name=name, aggregation=other))
    assert resolve(AlgorithmConfig(name=name)).aggregation == own
    build(AlgorithmConfig(name=name, aggregation=own))


ARMS: list[tuple[str, dict[str, Any]]] = [
    ("cispo", {"clip_high": 4.0, "normalize_std": True}),
    ("gmpo", {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.4) - 1, "normalize_std": True}),
    ("sapo", {"sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05, "normalize_std": True}),
    ("luspo", {"clip_low": 2e-3, "clip_high": 2.5e-3, "normalize_std": True, "mismatch": "off"}),
    (
        "vespo",
        {
            "vespo_c1_positive": 2.0,
            "vespo_c2_positive": 3.0,
            "vespo_c1_negative": 3.0,
            "vespo_c2_negative": 2.0,
            "normalize_std": False,
        },
    ),
    (
        "minirl",
        {"clip_low": 0.2, "clip_high": 0.27, "normalize_std": False, "mismatch": "truncate", "mismatch_high": 5.0},
    ),
]


@pytest.mark.parametrize(("name", "published"), ARMS)
def test_an_arm_s_unset_settings_are_the_published_ones_and_it_has_no_others(
    name: str, published: dict[str, Any]
) -> None:
    config = resolve(AlgorithmConfig(name=name))
    assert {key: getattr(config, key) for key in published} == published
    assert config.mini_batches == 4 and not config.kl_coefficient
    foreign = {"clip_low", "clip_high", *(f.name for f in fields(AlgorithmConfig) if f.name[:5] in ("sapo_", "vespo"))}
    assert {key for key in foreign if getattr(config, key) is not None} == foreign & set(published)
    assert resolve(config) == config and warnings(config, build(config)) == [], "the written config means the same"


@pytest.mark.parametrize(
    ("name", "setting", "value", "readers"),
    [
        ("sapo", "clip_low", 0.2, "gspo, gspo_token, grpo, gmpo, luspo, minirl"),
        ("cispo", "clip_low", 0.2, "gspo, gspo_token, grpo, gmpo, luspo, minirl"),
        ("vespo", "clip_high", 0.2, "gspo, gspo_token, grpo, cispo, gmpo, luspo, minirl"),
        ("minirl", "dual_clip", 3.0, "gspo, gspo_token, grpo, luspo"),
        ("gspo", "sapo_tau_positive", 1.0, "sapo"),
        ("grpo", "vespo_c1_negative", 3.0, "vespo"),
    ],
)
def test_a_setting_that_the_algorithm_never_reads_is_refused(
    name: str, setting: str, value: float, readers: str
) -> None:
    """verl's clip_ratio_c was advertised for GSPO, and read by nobody."""
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(UserError) as error:
        build(AlgorithmConfig(name=name, **settings))
    assert f"algorithm.{setting}={value} is not a setting of {name}" in str(error.value)
    assert str(error.value).endswith(f"It is read by {readers}.")


@pytest.mark.parametrize("setting", ["sapo_tau_negative", "vespo_c2_positive", "opsm_delta", "mismatch_high"])
def test_settings_that_must_be_positive(setting: str) -> None:
    settings: dict[str, Any] = {setting: 0.0}
    with pytest.raises(UserError, match=rf"algorithm.{setting}=0.0 must be positive"):
        AlgorithmConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "minirl"}, r'minirl weighs by the trainer/engine ratio \(mismatch="truncate"\), which is then 1'),
        ({"mismatch": "mask"}, r'gspo weighs by the trainer/engine ratio \(mismatch="mask"\), which is then 1'),
        ({"name": "sapo"}, r"sapo has no clip to tell.*old_logprobs_max_kl, e.g. 5e-5"),
        ({"name": "cispo"}, r"cispo has no clip to tell.*old_logprobs_max_kl, e.g. 5e-5"),
    ],
)
def test_the_engine_s_log_probs_are_refused_where_they_cannot_be_judged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(AlgorithmConfig(old_logprobs="auto", **settings))
    build(AlgorithmConfig(**settings | {"old_logprobs": "auto", "old_logprobs_max_kl": 1e-4, "mismatch": "off"}))


def test_a_band_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"mismatch_low=1.5 must be below mismatch_high=1.001.*0.999 and 1.001"):
        mismatch_of(AlgorithmConfig(mismatch="geometric", mismatch_low=1.5))
    mismatch_of(AlgorithmConfig(mismatch="truncate", mismatch_high=0.4))  # has no lower bound


def test_negative_kl_coefficient() -> None:
    with pytest.raises(UserError, match=r"kl_coefficient=-0.1"):
        build(AlgorithmConfig(kl_coefficient=-0.1))


WARNED: list[tuple[dict[str, Any], str]] = [
    ({"mini_batches": 1}, "nothing is ever clipped"),
    ({"name": "grpo", "clip_low": 3e-4, "clip_high": 4e-4}, "most tokens will be clipped"),
    ({"dual_clip": 3.0}, "hardly ever reaches it"),
    ({"mismatch_low": 0.9}, "algorithm.mismatch_low=0.9 has no effect"),
    ({"mismatch": "truncate", "mismatch_low": 0.9}, "algorithm.mismatch_low=0.9 has no effect"),
    ({"mismatch_high": 5.0}, "algorithm.mismatch_high=5.0 has no effect"),
    ({"dynamic_sampling_max_rounds": 9}, "algorithm.dynamic_sampling_max_rounds=9 has no effect"),
    ({"allow_unusual_clip": True}, "algorithm.allow_unusual_clip=True has no effect"),
    (
        {"name": "gmpo", "clip_low": 3e-4, "clip_high": 4e-4},
        "most tokens will be clipped. Usual: 0.32968 and 0.491825.",
    ),
    ({"name": "cispo", "clip_high": 4e-4}, "algorithm.clip_high=0.0004 is the scale of GSPO's"),
    ({"name": "luspo", "dual_clip": 3.0}, "hardly ever reaches it under luspo"),
    ({"name": "sapo", "sapo_tau_negative": 0.9}, "sapo_tau_negative=0.9 is below sapo_tau_positive=1"),
    ({"name": "vespo", "vespo_c1_negative": 0.5}, "vespo_c1_negative=0.5 is below 1"),
    ({"name": "minirl", "mismatch": "off"}, 'algorithm.mismatch="off": the weight π_old/μ is part of minirl'),
]


@pytest.mark.parametrize(("given_settings", "message"), WARNED)
def test_warnings(given_settings: dict[str, Any], message: str) -> None:
    config = AlgorithmConfig(**given_settings)
    found = warnings(config, build(config))
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    "given_settings",
    [
        {"mismatch": "mask", "mismatch_low": 0.9, "mismatch_high": 1.1},
        {"mismatch": "truncate", "mismatch_high": 5.0},
        {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 9},
        {"mismatch": "geometric", "mismatch_low": 0.99, "mismatch_high": 1.01},
        {"opsm_delta": 0.5},
        {"name": "grpo", "dual_clip": 3.0},
        {"name": "minirl", "mismatch_high": 3.0},
        {"name": "minirl", "mismatch": "off", "old_logprobs": "auto"},  # as the refusal of truncate says
        *({"name": name} for name in ALGORITHMS),
    ],
)
def test_settings_that_are_read_do_not_warn(given_settings: dict[str, Any]) -> None:
    config = AlgorithmConfig(**given_settings)
    assert warnings(config, build(config)) == []


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    mean, std = 0.5, math.sqrt((4 * 0.25) / 4)
    expected = [(r - mean) / (std + 1e-6) for r in rewards.tolist()]
    actual = build(AlgorithmConfig()).advantages(rewards)
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(expected, abs=1e-7)
    plain = build(AlgorithmConfig(normalize_std=False)).advantages(rewards)
    assert plain.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.0], abs=1e-7)


def test_advantages_leave_out_nan_and_keep_its_place() -> None:
    algorithm = build(AlgorithmConfig())
    with_nan = algorithm.advantages(torch.tensor([1.0, NAN, 0.0, NAN, 0.3]))
    without = algorithm.advantages(torch.tensor([1.0, 0.0, 0.3]))
    assert with_nan[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(with_nan[[0, 2, 4]], without)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in float64 the mean of three 0.1 is not 0.1
@pytest.mark.parametrize(
    "rewards",
    [[0.1] * 7, [1.0] * 8, [0.0, 0.0], [NAN, 0.7, NAN], [NAN, NAN], [NAN, 0.1, 0.1, 0.1], [1 / 3] * 3, [1e6 + 0.1] * 3],
)
def test_a_group_without_a_difference_gets_exactly_zero(
    rewards: list[float], normalize_std: bool, dtype: torch.dtype
) -> None:
    algorithm = build(AlgorithmConfig(normalize_std=normalize_std))
    values = torch.tensor(rewards, dtype=dtype)
    assert torch.equal(algorithm.advantages(values), torch.zeros(len(rewards)))
    assert not algorithm.is_informative(values)


def test_groups_do_not_mix() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.2, 0.2, 0.2], [0.1, NAN, 0.9]])
    algorithm = build(AlgorithmConfig())
    rows = torch.stack([algorithm.advantages(row) for row in rewards])
    assert torch.equal(algorithm.advantages(rewards), rows)
    assert algorithm.is_informative(rewards).tolist() == [True, False, True]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1).map(lambda x: round(x, 3)), st.just(NAN)), min_size=2, max_size=16),
    st.booleans(),
)
def test_advantages_of_any_group(rewards: list[float], normalize_std: bool) -> None:
    algorithm = build(AlgorithmConfig(normalize_std=normalize_std))
    values = torch.tensor(rewards)
    advantages = algorithm.advantages(values)
    kept = [r for r in rewards if not math.isnan(r)]
    assert advantages.isfinite().all()
    assert advantages[values.isnan()].eq(0).all()
    assert abs(advantages.sum().item()) < 1e-5 * len(rewards)
    if len(set(kept)) < 2:
        assert advantages.eq(0).all()
    elif normalize_std:
        spread = advantages[~values.isnan()].double().std().item()
        assert spread == pytest.approx(1.0, abs=5e-3)  # 1e-6 / std of at least 2.5e-4


def test_gspo_is_the_sequence_level_loss_at_its_clip() -> None:
    logprobs, batch = make_batch()
    algorithm = build(AlgorithmConfig(dual_clip=1.1))
    loss, stats = algorithm.loss(logprobs, batch, num_sequences=9)
    assert batch.old_logprobs is not None
    expected, _ = sequence_policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.response_mask,
        batch.cu_seqlens,
        batch.advantages,
        clip_low=3e-4,
        clip_high=4e-4,
        dual_clip=1.1,
        num_sequences=9,
    )
    assert torch.equal(loss, expected)
    assert stats.num_response_tokens.tolist() == [3, 1, 0, 4]


def test_gspo_refuses_advantages_by_token() -> None:
    logprobs, batch = make_batch(per_token=True)
    with pytest.raises(ValueError, match=r"one advantage a response, \[4\].*gspo_token"):
        build(AlgorithmConfig()).loss(logprobs, batch, num_sequences=4)


def gradient_of(algorithm: Algorithm, logprobs: Tensor, batch: MicroBatch, **arguments: Any) -> tuple[Tensor, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    loss, _ = algorithm.loss(leaf, batch, num_sequences=4, **arguments)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("tail", [0, 3])
def test_gspo_token_with_one_advantage_a_response_is_gspo(tail: int) -> None:
    logprobs, batch = make_batch()
    if tail:  # tokens behind the last sequence
        logprobs = torch.cat([logprobs, torch.full((tail,), NAN)])
        assert batch.old_logprobs is not None
        batch = replace(
            batch,
            old_logprobs=torch.cat([batch.old_logprobs, torch.full((tail,), NAN)]),
            response_mask=torch.cat([batch.response_mask, torch.zeros(tail, dtype=torch.bool)]),
        )
    weights = torch.rand(logprobs.numel())
    for arguments in ({}, {"weights": weights}):
        gspo = gradient_of(build(AlgorithmConfig(name="gspo")), logprobs, batch, **arguments)
        token = gradient_of(build(AlgorithmConfig(name="gspo_token")), logprobs, batch, **arguments)
        assert torch.equal(gspo[0], token[0]) and torch.equal(gspo[1], token[1])


def test_gspo_token_by_hand() -> None:
    """One response of four tokens with s above the band: positive tokens are clipped, negative ones not."""
    logprobs, batch = make_batch()
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.25])
    batch = replace(
        batch,
        cu_seqlens=torch.tensor([0, 4]),
        response_mask=torch.ones(4, dtype=torch.bool),
        old_logprobs=torch.zeros(4),
        advantages=advantages,
    )
    logprobs = torch.tensor([0.1, -0.05, 0.02, 0.05])
    loss, gradient = gradient_of(build(AlgorithmConfig(name="gspo_token")), logprobs, batch)
    s = math.exp(0.03)
    assert loss.item() == pytest.approx(-(1.0004 * 1.5 - s * 2.25) / 4 / 4, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, s * 2.0 / 16, 0.0, s * 0.25 / 16], rel=1e-6)


def test_grpo_by_hand() -> None:
    """Token ratios 1.5, 1.1 and 0.7 with A > 0: the first is clipped, the others keep their own ratio."""
    _, batch = make_batch()
    batch = replace(
        batch,
        cu_seqlens=torch.tensor([0, 3]),
        response_mask=torch.ones(3, dtype=torch.bool),
        old_logprobs=torch.zeros(3),
        advantages=torch.tensor([2.0]),
    )
    logprobs = torch.tensor([1.5, 1.1, 0.7]).log()
    loss, gradient = gradient_of(build(AlgorithmConfig(name="grpo")), logprobs, batch)
    assert loss.item() == pytest.approx(-2.0 * (1.27 + 1.1 + 0.7) / 3 / 4, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, -2.0 * 1.1 / 12, -2.0 * 0.7 / 12], rel=1e-6)
    negative = replace(batch, advantages=torch.tensor([-2.0]))
    _, gradient = gradient_of(build(AlgorithmConfig(name="grpo")), logprobs, negative)
    assert gradient.tolist() == pytest.approx([2.0 * 1.5 / 12, 2.0 * 1.1 / 12, 0.0], rel=1e-6)
