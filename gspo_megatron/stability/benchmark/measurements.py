"""Definitions of what `measure` measures, on plain arrays of token log-ratios.

d[i, t] = log π_new − log π_old of token t of response i; all responses have the same length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gspo_megatron.stability.benchmark.clip_model import PAPER_CLIP, clip_rates, normal_clip_rates
from gspo_megatron.stability.benchmark.statistics import slope

GRPO_CLIP = (0.2, 0.27)

# Precision: simulated mismatch of the central warning's table (nats a token), and plain shifts of log-probabilities.
MISMATCHES = (3e-5, 1e-4, 3e-4, 7.5e-4, 1.5e-3)
FLIPS = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the (token, layer) expert sets
FLIPS_OF_PRECISION = (0.01, 0.1)
NOISES = (0.01, 0.03)  # standard deviation of a token's log-probability
BIASES = (2e-4, 5e-4, 1e-3)
FLIP_CURVES = ("token_rms", "sequence_rms", "weight_rms", "token_outside", "sequence_outside_wide")
RATE_CURVES = ("positive", "negative", "positive_predicted", "negative_predicted")

Values = dict[str, float | None]
Curves = dict[str, list[float]]


def length_scaling(d: np.ndarray, *, shortest: int = 8, seed: int = 0) -> tuple[Values, Curves]:
    """How ratios spread over responses against their length.

    For T = 8, 16, … up to the length: std over responses of log s = mean of the first T log-ratios and of log W = their
    sum; the largest token ratio among the first T tokens, mean over responses; std of a token's log-ratio. The same for
    all blocks of T tokens instead of the first T (`_blocks`: no drift along the response), and with all
    log-ratios dealt out anew over responses and positions (`_independent`: what independent tokens would give).

    Slopes are least-squares fits of log y over log T.
    """
    lengths = [shortest * 2**i for i in range(20) if shortest * 2**i <= d.shape[1]]
    generator = np.random.default_rng(seed)
    independent = generator.permutation(d.ravel()).reshape(d.shape)
    curves: Curves = {name: [] for name in _LENGTH_CURVES}
    for length in lengths:
        prefix, apart = d[:, :length], independent[:, :length]
        blocks = d[:, : d.shape[1] // length * length].reshape(-1, length)
        for name, part in (("", prefix), ("_blocks", blocks), ("_independent", apart)):
            curves[f"std_log_s{name}"].append(float(part.mean(1).std(ddof=1)))
            curves[f"std_log_w{name}"].append(float(part.sum(1).std(ddof=1)))
        curves["token_ratio_max"].append(float(np.exp(prefix.max(1)).mean()))
        curves["std_token"].append(float(prefix.std(ddof=1)))
    values: Values = {f"slope_{name}": _log_slope(lengths, curve) for name, curve in curves.items()}
    values["token_ratio_max_growth"] = curves["token_ratio_max"][-1] / curves["token_ratio_max"][0]
    curves["length"] = [float(n) for n in lengths]
    return values, curves


def _log_slope(lengths: list[int], curve: list[float]) -> float | None:
    """None where a spread is 0, as that of a policy that has not moved, and has no logarithm."""
    return slope(np.log(lengths).tolist(), np.log(curve).tolist()) if min(curve) > 0 else None


_LENGTH_CURVES = (
    "std_log_s", "std_log_w", "std_log_s_blocks", "std_log_w_blocks", "std_log_s_independent",
    "std_log_w_independent", "token_ratio_max", "std_token",
)  # fmt: skip


def ratio_change(d: np.ndarray) -> Values:
    """How far tokens' and sequences' ratios moved: root mean squares of log-ratios (about 0: where nothing moved, each
    is 0), the largest token ratio, and the shares that would be clipped on either side."""
    log_s = d.mean(1)
    return {
        "token_rms": float(np.sqrt((d**2).mean())),
        "sequence_rms": float(np.sqrt((log_s**2).mean())),
        "weight_rms": float(np.sqrt((d.sum(1) ** 2).mean())),
        "token_ratio_max": float(np.exp(d.max())),
        "token_outside": _outside(d, GRPO_CLIP),
        "sequence_outside": _outside(log_s, PAPER_CLIP),
        "sequence_outside_wide": _outside(log_s, GRPO_CLIP),
    }


def _outside(log_ratio: np.ndarray, clip: tuple[float, float]) -> float:
    low, high = np.log1p(-clip[0]), np.log1p(clip[1])
    return float(((log_ratio < low) | (log_ratio > high)).mean())


def clip_by_sign(d: np.ndarray, clip: tuple[float, float] = PAPER_CLIP) -> Values:
    """Shares of responses that GSPO would clip, by the sign that their advantage may have, and what the closed-form
    model says (clip_model.py).

    `kl` is the k3 estimate, mean of e^d − 1 − d, which is never negative; `kl_k1` is −mean(d). `_predicted` takes the
    model with that KL alone; `_normal` takes log s as normal with its measured mean and variance.
    """
    log_s = d.mean(1)
    kl = float((np.expm1(d) - d).mean())
    predicted = clip_rates(kl, d.shape[1], clip_low=clip[0], clip_high=clip[1])
    normal = normal_clip_rates(float(log_s.mean()), float(log_s.var(ddof=1)), clip_low=clip[0], clip_high=clip[1])
    positive, negative = float((log_s > np.log1p(clip[1])).mean()), float((log_s < np.log1p(-clip[0])).mean())
    return {
        "kl": kl,
        "kl_k1": float(-d.mean()),
        "positive": positive,
        "negative": negative,
        "gap": negative - positive,
        "positive_predicted": predicted.positive,
        "negative_predicted": predicted.negative,
        "positive_normal": normal.positive,
        "negative_normal": normal.negative,
        "error": max(abs(positive - predicted.positive), abs(negative - predicted.negative)),
        "std_log_s": float(log_s.std(ddof=1)),
    }


def prefixed(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values under NAME_key."""
    return {f"{name}_{key}": value for key, value in values.items()}


def measured_names(what: str) -> tuple[set[str], set[str]]:
    """Names of the values and of the curves that `measure` with measure.what = `what` may write."""
    nothing = np.zeros((2, 16))
    if what == "lengths":
        values, curves = length_scaling(nothing)
        return (
            {f"{of}_{key}" for of in ("update", "fp8") for key in values},
            {f"{of}_{key}" for of in ("update", "fp8") for key in curves},
        )
    if what == "flips":
        keys = [*ratio_change(nothing), "rms_ratio", "slope_std_log_s"]
        return {f"flip_{share:g}_{key}" for share in FLIPS for key in keys}, {"share", *FLIP_CURVES}
    kinds = ["engine", "fp8", "bf16"]
    for name, levels in (("flip", FLIPS_OF_PRECISION), ("noise", NOISES), ("bias", BIASES), ("mismatch", MISMATCHES)):
        kinds += [f"{name}_{level:g}" for level in levels]
    of_kinds = {f"{kind}_{key}" for kind in kinds for key in clip_by_sign(nothing)}
    return of_kinds | {"mismatch_error"}, {"kl", *RATE_CURVES}
