"""Algorithms: one file each, one line each in ALGORITHMS."""

from __future__ import annotations

from dataclasses import fields, replace
from types import MappingProxyType
from typing import Final

from gspo_megatron.algorithms import unusual
from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.cispo import CISPO
from gspo_megatron.algorithms.gmpo import GMPO
from gspo_megatron.algorithms.grpo import GRPO
from gspo_megatron.algorithms.gspo import GSPO
from gspo_megatron.algorithms.gspo_token import GSPOToken
from gspo_megatron.algorithms.luspo import LUSPO
from gspo_megatron.algorithms.minirl import MiniRL
from gspo_megatron.algorithms.mismatch import Mismatch
from gspo_megatron.algorithms.sapo import SAPO
from gspo_megatron.algorithms.total_loss import Objective, objective
from gspo_megatron.algorithms.vespo import VESPO
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.errors import UserError, nearest
from gspo_megatron.ops import Implementation

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Mismatch",
    "Objective",
    "build",
    "mismatch_of",
    "objective",
    "resolve",
    "warnings",
]

ALGORITHMS: Final = MappingProxyType[str, type[Algorithm]](
    {
        "gspo": GSPO,
        "gspo_token": GSPOToken,
        "grpo": GRPO,
        "cispo": CISPO,
        "gmpo": GMPO,
        "sapo": SAPO,
        "luspo": LUSPO,
        "vespo": VESPO,
        "minirl": MiniRL,
    }
)

# Fields of the config that are not an algorithm's own settings: read whatever the algorithm.
_COMMON: Final = frozenset({"aggregation", "mismatch", "mismatch_low", "mismatch_high", "opsm_delta"})


def build(config: AlgorithmConfig, implementation: Implementation = "native") -> Algorithm:
    """The algorithm of a config, fields left unset taking the algorithm's defaults.

    Raises:
        UserError: unknown name; a setting that the algorithm does not have; an aggregation that changes the objective;
            a clip of another algorithm's scale; the engine's log-probabilities where they cannot stand for π_old.
    """
    kind = _kind(config)
    _refuse_foreign_settings(config, kind)
    given = {f.name: getattr(config, f.name) for f in fields(kind) if f.name != "implementation"}
    settings = {name: value for name, value in given.items() if value is not None}
    algorithm = kind(**settings, implementation=implementation)
    _refuse_other_aggregation(config, algorithm)
    if config.old_logprobs != "recompute":
        _check_bypass(config, algorithm)
    if unusual.clips(algorithm) and not config.allow_unusual_clip:
        raise UserError(unusual.clip_message(algorithm) + " Set algorithm.allow_unusual_clip=true to run it anyway.")
    return algorithm


def mismatch_of(config: AlgorithmConfig) -> Mismatch:
    """The mismatch weights of a config; where it does not say, the algorithm's own. Raises UserError for a bad band."""
    return Mismatch.from_config(config, _kind(config).default_mismatch)


def resolve(config: AlgorithmConfig) -> AlgorithmConfig:
    """The config with the algorithm's own values for what was left unset; what it does not have stays unset.

    Raises UserError like `build` and `mismatch_of`.
    """
    algorithm, mismatch = build(config), mismatch_of(config)
    values = {f.name: getattr(algorithm, f.name) for f in fields(algorithm) if f.name != "implementation"}
    values |= {"aggregation": algorithm.aggregation, "mismatch": mismatch.mode}
    values |= {"mismatch_low": mismatch.low, "mismatch_high": mismatch.high}
    return replace(config, **values)


def warnings(config: AlgorithmConfig, algorithm: Algorithm) -> list[str]:
    """Settings that are allowed and probably not meant, one sentence or two each."""
    return unusual.warnings(config, algorithm, mismatch_of(config).mode)


def _kind(config: AlgorithmConfig) -> type[Algorithm]:
    if config.name not in ALGORITHMS:
        raise UserError(
            f'algorithm.name="{config.name}" is unknown; use one of {", ".join(ALGORITHMS)}.'
            f"{nearest(config.name, ALGORITHMS)}"
        )
    return ALGORITHMS[config.name]


def _refuse_foreign_settings(config: AlgorithmConfig, kind: type[Algorithm]) -> None:
    """A setting of another algorithm would be read by nobody."""
    own = {f.name for f in fields(kind)} | _COMMON
    for f in fields(AlgorithmConfig):
        value = getattr(config, f.name)
        if f.default is not None or value is None or f.name in own:
            continue
        readers = [name for name, other in ALGORITHMS.items() if f.name in {x.name for x in fields(other)}]
        raise UserError(
            f"algorithm.{f.name}={value} is not a setting of {config.name}, which would never read it; leave it out. "
            f"It is read by {', '.join(readers)}."
        )


def _refuse_other_aggregation(config: AlgorithmConfig, algorithm: Algorithm) -> None:
    if config.aggregation in (None, algorithm.aggregation):
        return
    if config.aggregation == "token_mean" and isinstance(algorithm, GSPO) and algorithm.aggregation == "sequence_mean":
        reason = (
            f"{algorithm.name} gives every response the same weight, whatever its length; a mean over tokens would "
            "weight it by length and be another objective"
        )
    else:
        reason = f"{algorithm.name} is defined by its own, as in its paper; no other is built"
    raise UserError(f'algorithm.aggregation="{config.aggregation}": {reason}. Use "{algorithm.aggregation}".')


def _check_bypass(config: AlgorithmConfig, algorithm: Algorithm) -> None:
    """The engine's log-probabilities as old ones: what the config alone cannot tell is amiss."""
    given = f'algorithm.old_logprobs="{config.old_logprobs}"'
    mode = mismatch_of(config).mode
    if mode != "off":
        raise UserError(
            f'{given}: {config.name} weighs by the trainer/engine ratio (mismatch="{mode}"), which is then 1. '
            'Use old_logprobs="recompute", or mismatch="off"'
        )
    if algorithm.clip is None and not config.old_logprobs_max_kl:
        raise UserError(
            f"{given}: {config.name} has no clip to tell how large a KL of engine and trainer it bears; "
            "set algorithm.old_logprobs_max_kl, e.g. 5e-5"
        )
