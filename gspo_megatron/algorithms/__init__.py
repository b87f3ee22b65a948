"""Algorithms: one file each, one line each in ALGORITHMS."""

from __future__ import annotations

from dataclasses import fields, replace
from types import MappingProxyType
from typing import Final

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.grpo import GRPO
from gspo_megatron.algorithms.gspo import GSPO
from gspo_megatron.algorithms.gspo_token import GSPOToken
from gspo_megatron.algorithms.mismatch import Mismatch
from gspo_megatron.algorithms.total_loss import Objective, objective
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.errors import UserError, nearest
from gspo_megatron.ops import Implementation

__all__ = ["ALGORITHMS", "Algorithm", "Mismatch", "Objective", "build", "objective", "resolve", "warnings"]

ALGORITHMS: Final = MappingProxyType(
    {
        "gspo": GSPO,
        "gspo_token": GSPOToken,
        "grpo": GRPO,
    }
)


def build(config: AlgorithmConfig, implementation: Implementation = "native") -> Algorithm:
    """The algorithm of a config, fields left unset taking the algorithm's defaults.

    Raises:
        UserError: unknown name; an aggregation that changes the objective; a clip of another algorithm's scale.
    """
    if config.name not in ALGORITHMS:
        raise UserError(
            f'algorithm.name="{config.name}" is unknown; use one of {", ".join(ALGORITHMS)}.'
            f"{nearest(config.name, ALGORITHMS)}"
        )
    kind = ALGORITHMS[config.name]
    given = {f.name: getattr(config, f.name) for f in fields(kind) if f.name != "implementation"}
    settings = {name: value for name, value in given.items() if value is not None}
    algorithm = kind(**settings, implementation=implementation)
    _refuse_token_mean(config, algorithm)
    if _unusual_clips(algorithm) and not config.allow_unusual_clip:
        raise UserError(_unusual_clip_message(algorithm) + " Set algorithm.allow_unusual_clip=true to run it anyway.")
    return algorithm


def resolve(config: AlgorithmConfig) -> AlgorithmConfig:
    """The config with the algorithm's own values for what was left unset. Raises UserError like `build`."""
    algorithm = build(config)
    unset = [f.name for f in fields(AlgorithmConfig) if getattr(config, f.name) is None]
    return replace(config, **{name: getattr(algorithm, name) for name in unset})


def warnings(config: AlgorithmConfig, algorithm: Algorithm) -> list[str]:
    """Settings that are allowed and probably not meant, one sentence or two each."""
    found = []
    if algorithm.mini_batches == 1:
        found.append(
            "algorithm.mini_batches=1: with one update per rollout batch the policy is still the one that sampled, "
            "every ratio is 1 and nothing is ever clipped. The GSPO paper uses 4."
        )
    if _unusual_clips(algorithm):
        found.append(_unusual_clip_message(algorithm))
    if algorithm.level == "token" and max(algorithm.clip_low, algorithm.clip_high) < 0.01:
        found.append(
            f"algorithm.clip_low={algorithm.clip_low:g}, clip_high={algorithm.clip_high:g} is the scale of GSPO's "
            f"sequence ratio; {algorithm.name} clips token ratios, which vary far more: most tokens will be clipped. "
            "Usual: 0.2 and 0.27."
        )
    if algorithm.level == "sequence" and algorithm.dual_clip is not None and algorithm.dual_clip > 1.5:
        found.append(
            f"algorithm.dual_clip={algorithm.dual_clip:g}: a length-normalised sequence ratio stays near 1 and hardly "
            f"ever reaches it under {algorithm.name}."
        )
    return found + _unread_settings(config, algorithm)


def _refuse_token_mean(config: AlgorithmConfig, algorithm: Algorithm) -> None:
    if config.aggregation != "token_mean":
        return
    if algorithm.level == "sequence":
        reason = (
            f"{algorithm.name} gives every response the same weight, whatever its length; a mean over tokens would "
            "weight it by length and be another objective"
        )
    else:
        reason = f"{algorithm.name} averages the tokens of each response first, as in its paper; no other mean is built"
    raise UserError(f'algorithm.aggregation="token_mean": {reason}. Use "sequence_mean".')


def _unusual_clips(algorithm: Algorithm) -> list[str]:
    limit = algorithm.usual_clip_below
    if limit is None:
        return []
    return [
        f"algorithm.{name}={getattr(algorithm, name):g}"
        for name in ("clip_low", "clip_high")
        if getattr(algorithm, name) >= limit
    ]


def _unusual_clip_message(algorithm: Algorithm) -> str:
    return (
        f"{', '.join(_unusual_clips(algorithm))}: {algorithm.name} clips a length-normalised sequence ratio, which "
        f"stays so close to 1 that GRPO's clip of 0.2 never clips it, and {algorithm.usual_clip_below:g} hardly ever. "
        "The paper uses clip_low=3e-4 and clip_high=4e-4."
    )


def _unread_settings(config: AlgorithmConfig, algorithm: Algorithm) -> list[str]:
    """Settings changed from their default that nothing reads, given the others."""
    read = {
        "mismatch_low": (config.mismatch == "mask", 'algorithm.mismatch="mask"'),
        "mismatch_high": (config.mismatch != "off", 'algorithm.mismatch="truncate" or "mask"'),
        "dynamic_sampling_max_rounds": (algorithm.dynamic_sampling, "algorithm.dynamic_sampling=true"),
        "old_logprobs_max_kl": (config.old_logprobs != "recompute", 'algorithm.old_logprobs="rollout" or "auto"'),
        "old_logprobs_every": (config.old_logprobs != "recompute", 'algorithm.old_logprobs="rollout" or "auto"'),
        "allow_unusual_clip": (bool(_unusual_clips(algorithm)), "a clip that is refused otherwise"),
    }
    default = AlgorithmConfig()
    return [
        f"algorithm.{name}={getattr(config, name)} has no effect: it is read only with {reader}."
        for name, (is_read, reader) in read.items()
        if not is_read and getattr(config, name) != getattr(default, name)
    ]
