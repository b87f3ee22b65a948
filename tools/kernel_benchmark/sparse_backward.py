"""The output layer's backward pass where the clip leaves part of the sequences without a gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron import ops
from kernel_benchmark.case import Candidate, Case, Objective, Prepared, Problem, Rates, Sizes, Tensors
from kernel_benchmark.linear_logprobs import Layer, LayerCheck

PERCENT = (0, 15, 50)  # of the sequences are clipped
NUM_SEQUENCES = 128
NATIVE, WHOLE = "gspo_megatron, skip_zero_rows", "gspo_megatron"


@dataclass(kw_only=True)
class SparseProblem(Problem):
    layer: Layer


def objective_name(percent: int) -> str:
    return f"{percent} % clipped"


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> SparseProblem:
    generator = torch.Generator(device).manual_seed(0)
    layer = Layer.random(sizes, device, dtype, generator)
    num_tokens = len(layer.targets)
    num_sequences = math.gcd(num_tokens, NUM_SEQUENCES)
    grad_logprobs = torch.randn(num_sequences, num_tokens // num_sequences, generator=generator, device=device)
    order = torch.randperm(num_sequences, generator=generator, device=device)
    check = LayerCheck(layer)

    def objective(percent: int) -> Objective:
        num_clipped = round(num_sequences * percent / 100)
        sparse = grad_logprobs.clone()
        sparse[order[:num_clipped]] = 0
        upstream = sparse.flatten()

        def floors(rates: Rates) -> dict[str, float]:
            """One product in forward; in backward three, over the rows that have a gradient."""
            assert rates.multiply is not None
            one = 2 * math.prod(layer.product) / rates.multiply
            return {"products over rows with a gradient": one * (1 + 3 * (1 - num_clipped / num_sequences))}

        return Objective((upstream,), check.tokens(upstream, None), floors)

    return SparseProblem(
        objectives={objective_name(percent): objective(percent) for percent in PERCENT},
        result_bytes=layer.result_bytes,
        probe_bytes=layer.weight.numel() * layer.weight.element_size(),
        product=layer.product,
        layer=layer,
    )


def native(problem: SparseProblem, *, skip_zero_rows: bool) -> Prepared:
    layer = problem.layer

    def forward() -> Tensors:
        logprobs: Tensor
        logprobs, _ = ops.linear_logprobs(layer.hidden, layer.weight, layer.targets, skip_zero_rows=skip_zero_rows)
        return (logprobs,)

    return Prepared(forward, (layer.hidden, layer.weight))


def _way(skip_zero_rows: bool) -> Callable[[SparseProblem], Prepared]:
    return functools.partial(native, skip_zero_rows=skip_zero_rows)


CASE = Case(
    name="sparse_backward",
    title="Log-probs from hidden states, part of the sequences clipped",
    letters="TxHxV",
    default_sizes={"cpu": (1024, 512, 32768), "cuda": (32768, 2048, 151936)},
    small_sizes=(32, 16, 512),
    dtypes={"cpu": "float32", "cuda": "bfloat16"},
    make=make,
    floor="one matrix product over all rows, three over the rows that have a gradient",
    candidates=tuple(
        Candidate(name, objective_name(percent), _way(skip), ours=True)
        for percent in PERCENT
        for name, skip in ((NATIVE, True), (WHOLE, False))
    ),
)
