"""Settings of an algorithm that are refused or warned of because they are unusual, or read by nobody."""

from __future__ import annotations

from dataclasses import fields

from gspo_megatron.algorithms.base import Algorithm
from gspo_megatron.algorithms.mismatch import BANDS, Mode
from gspo_megatron.algorithms.sapo import SAPO
from gspo_megatron.algorithms.vespo import VESPO
from gspo_megatron.config import AlgorithmConfig


def warnings(config: AlgorithmConfig, algorithm: Algorithm, mode: Mode) -> list[str]:
    """Sentences about settings that are allowed and probably not meant; `mode` is that of the mismatch weights."""
    found = []
    if algorithm.mini_batches == 1:
        found.append(
            "algorithm.mini_batches=1: with one update per rollout batch the policy is still the one that sampled, "
            "every ratio is 1 and nothing is ever clipped. The GSPO paper uses 4."
        )
    if clips(algorithm):
        found.append(clip_message(algorithm))
    set_clips = _clips(algorithm)
    if algorithm.level == "token" and set_clips and max(set_clips.values()) < 0.01:
        given = ", ".join(f"{name}={value:g}" for name, value in set_clips.items())
        usual = " and ".join(f"{value:g}" for value in _clips(type(algorithm)()).values())
        found.append(
            f"algorithm.{given} is the scale of GSPO's sequence ratio; {algorithm.name} clips token ratios, which vary "
            f"far more: most tokens will be clipped. Usual: {usual}."
        )
    dual_clip = getattr(algorithm, "dual_clip", None)
    if algorithm.level == "sequence" and dual_clip is not None and dual_clip > 1.5:
        found.append(
            f"algorithm.dual_clip={dual_clip:g}: a length-normalised sequence ratio stays near 1 and hardly "
            f"ever reaches it under {algorithm.name}."
        )
    return [
        *found,
        *_unusual_shapes(algorithm),
        *(_unusual_mismatch(algorithm, mode) if config.old_logprobs == "recompute" else []),  # else the weight is 1
        *_unread_settings(config, algorithm, mode),
    ]


def _clips(algorithm: Algorithm) -> dict[str, float]:
    names = {f.name for f in fields(algorithm)}
    return {name: getattr(algorithm, name) for name in ("clip_low", "clip_high") if name in names}


def clips(algorithm: Algorithm) -> list[str]:
    """The clips that are of another algorithm's scale, as settings."""
    limit = algorithm.usual_clip_below
    if limit is None:
        return []
    return [f"algorithm.{name}={value:g}" for name, value in _clips(algorithm).items() if value >= limit]


def clip_message(algorithm: Algorithm) -> str:
    """What is wrong with them, and what the paper uses."""
    usual = _clips(type(algorithm)())
    return (
        f"{', '.join(clips(algorithm))}: {algorithm.name} clips a length-normalised sequence ratio, which "
        f"stays so close to 1 that GRPO's clip of 0.2 never clips it, and {algorithm.usual_clip_below:g} hardly ever. "
        f"The paper uses clip_low={_short(usual['clip_low'])} and clip_high={_short(usual['clip_high'])}."
    )


def _short(value: float) -> str:
    """3e-4, where Python writes 0.0003."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _unusual_shapes(algorithm: Algorithm) -> list[str]:
    """Gates and kernels against what their papers ask of them."""
    found = []
    if isinstance(algorithm, SAPO) and algorithm.sapo_tau_negative < algorithm.sapo_tau_positive:
        found.append(
            f"algorithm.sapo_tau_negative={algorithm.sapo_tau_negative:g} is below "
            f"sapo_tau_positive={algorithm.sapo_tau_positive:g}: in the paper the gradients of negative advantages are "
            "those that fall off faster. Usual: 1.05 and 1."
        )
    if isinstance(algorithm, VESPO):
        found += [
            f"algorithm.{name}={getattr(algorithm, name):g} is below 1: the paper's bound on the weights' variance "
            "is then void (proposition 3.1). Usual: 2 and 3."
            for name in ("vespo_c1_positive", "vespo_c1_negative")
            if getattr(algorithm, name) < 1
        ]
    return found


def _unusual_mismatch(algorithm: Algorithm, mode: Mode) -> list[str]:
    own = algorithm.default_mismatch.mode
    if mode == own or own == "off":
        return []
    return [
        f'algorithm.mismatch="{mode}": the weight π_old/μ is part of {algorithm.name}; its paper truncates it at '
        f'{algorithm.default_mismatch.high:g}, mismatch="{own}".'
    ]


def _unread_settings(config: AlgorithmConfig, algorithm: Algorithm, mode: Mode) -> list[str]:
    """Settings changed from their default that nothing reads, given the others."""
    low, high = BANDS[mode]
    default = AlgorithmConfig(mismatch_low=low, mismatch_high=high)
    read = {
        "mismatch_low": (mode in ("mask", "geometric"), 'algorithm.mismatch="mask" or "geometric"'),
        "mismatch_high": (mode != "off", 'algorithm.mismatch="truncate", "mask" or "geometric"'),
        "dynamic_sampling_max_rounds": (algorithm.dynamic_sampling, "algorithm.dynamic_sampling=true"),
        "old_logprobs_max_kl": (config.old_logprobs != "recompute", 'algorithm.old_logprobs="rollout" or "auto"'),
        "old_logprobs_every": (config.old_logprobs != "recompute", 'algorithm.old_logprobs="rollout" or "auto"'),
        "allow_unusual_clip": (bool(clips(algorithm)), "a clip that is refused otherwise"),
    }
    return [
        f"algorithm.{name}={getattr(config, name)} has no effect: it is read only with {reader}."
        for name, (is_read, reader) in read.items()
        if not is_read and getattr(config, name) not in (None, getattr(default, name))
    ]
