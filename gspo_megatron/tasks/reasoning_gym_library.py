"""Access to the reasoning_gym package: its data sets by name, their parameters, their scores.

Imports nothing of torch: `score_entry` runs in reward workers.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import reasoning_gym
import reasoning_gym.factory

from gspo_megatron.errors import UserError, nearest

# Data sets whose score_answer evaluates the response as code or as a symbolic expression: `9**9**9` would
# hang the training process.
EVALUATES_RESPONSE = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
_OWN_PARAMS = {
    "seed": "run.seed decides it",
    "size": "the order of prompts is endless",
}


def registered() -> dict[str, tuple[type, type]]:
    """Name → (data set class, configuration class) of every data set."""
    return reasoning_gym.factory.DATASETS


def check(name: str, params: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown data set, an unknown parameter or one of a wrong type."""
    datasets = registered()
    if name not in datasets:
        raise UserError(
            f'task.dataset="{name}" is no data set of reasoning_gym.{nearest(name, datasets)} '
            f"There are {len(datasets)}: {', '.join(sorted(datasets))}"
        )
    config_class = datasets[name][1]
    known = [f.name for f in dataclasses.fields(config_class) if f.name not in _OWN_PARAMS]
    hints = typing.get_type_hints(config_class)
    for key, value in params.items():
        if key in _OWN_PARAMS:
            raise UserError(f"task.params.{key}={value!r} cannot be set: {_OWN_PARAMS[key]}; remove it")
        if key not in known:
            raise UserError(
                f'task.params.{key} is no parameter of reasoning_gym\'s "{name}".{nearest(key, known)} '
                f"Parameters: {', '.join(known)}"
            )
        _check_type(key, value, hints[key])


def make(name: str, params: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A data set of `size` items, made lazily by index.

    Raises:
        UserError: the data set refuses the parameters.
    """
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)
    # Each data set checks its parameters in its own way: assertions, ValueError, a missing data file.
    except (AssertionError, ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(refusal(name, params, error)) from error


def refusal(name: str, params: Mapping[str, Any], error: Exception) -> str:
    """The message for parameters with which a data set does not work."""
    return (
        f'reasoning_gym\'s "{name}" refuses task.params={dict(params)}: '
        f"{type(error).__name__}: {error}; correct the parameters"
    )


def score_entry(response_text: str, entry: Mapping[str, Any], *, name: str, params_json: str) -> float:
    """reasoning_gym's own score of a response to an entry."""
    return float(_scoring_dataset(name, params_json).score_answer(response_text, entry))


@lru_cache(maxsize=1)
def _scoring_dataset(name: str, params_json: str) -> Any:
    return make(name, json.loads(params_json), seed=0, size=1)


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Refuse a value of a wrong simple type; other annotations are left to the data set's own check."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not all(option in (bool, int, float, str, type(None)) for option in options):
        return
    accepted = set(options) | ({int} if float in options else set())
    if type(value) not in accepted:
        expected = " or ".join(sorted(option.__name__ for option in options if option is not type(None)))
        raise UserError(f"task.params.{key}={value!r} must be of type {expected}, found {type(value).__name__}")
