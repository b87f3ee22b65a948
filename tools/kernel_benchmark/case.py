"""What a case is made of: a problem, what is computed of it, and the candidates that compute it.

Letters in shapes: T packed tokens, S sequences, V vocabulary, H hidden size, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Rates:
    """What this machine reaches in the same run, single calls of torch on arrays of the case's own size."""

    read: float  # bytes/s of amax
    copy: float  # bytes/s of copy_, reading and writing counted
    update: float  # bytes/s of mul_ in place, reading and writing counted
    multiply: float | None  # FLOP/s of the case's matrix products; None where there are none


@dataclass(frozen=True)
class Objective:
    """What a candidate computes: its outputs, and the gradient of the leaves for these incoming gradients."""

    upstream: Tensors
    errors: Callable[[Tensors, Tensors], dict[str, float]]  # of outputs and gradients, by name
    floors: Callable[[Rates], dict[str, float]]  # seconds of forward and backward together that none can beat, by name


@dataclass(kw_only=True)
class Problem:
    """The inputs of all candidates. `restore` puts back what a candidate may have overwritten."""

    objectives: Mapping[str, Objective]
    result_bytes: int  # gradients that every candidate has to return and that lie in memory of their own
    probe_bytes: int  # size of the arrays that Rates are measured with
    product: tuple[int, int, int] | None = None  # T, H, V of the case's matrix products

    def restore(self) -> None:
        """Most problems have nothing that is overwritten."""


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Prepared:
    """A candidate that is ready to run."""

    forward: Callable[[], Tensors]
    leaves: Tensors
    as_problem: Callable[[Tensors], Tensors] = field(default=lambda gradients: gradients)  # not timed


@dataclass(frozen=True)
class Candidate(Generic[P]):
    """Someone's way to an objective. `prepare` imports what it needs and may raise ImportError."""

    name: str
    objective: str
    prepare: Callable[[P], Prepared]
    ours: bool = False
    compiled: bool = False  # by torch.compile, for each shape anew
    only_on: str | None = None  # device type

    @property
    def key(self) -> str:
        return f"{self.objective}: {self.name}"


@dataclass(frozen=True)
class Case(Generic[P]):
    name: str
    title: str
    letters: str  # of its sizes
    default_sizes: Mapping[str, Sizes]  # by device type
    small_sizes: Sizes  # enough to load all code
    make: Callable[[Sizes, torch.device, torch.dtype], P]
    candidates: Sequence[Candidate[P]]
    dtypes: Mapping[str, str]  # by device type
    has_dtype: bool = field(default=True, kw_only=True)  # false: always as in dtypes, whatever is asked for
    floor: str  # in words


def run(prepared: Prepared, upstream: Tensors) -> tuple[Tensors, Tensors]:
    """Forward and backward. Returns outputs and gradients of the leaves."""
    outputs = prepared.forward()
    return outputs, backward(prepared, outputs, upstream)


def backward(prepared: Prepared, outputs: Tensors, upstream: Tensors) -> Tensors:
    # Not .backward(): it would copy a gradient that shares the logits' memory.
    return torch.autograd.grad(outputs, prepared.leaves, upstream)
