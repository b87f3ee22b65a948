"""RMSNorm: torch's values to the bit, and its gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron.policy.norm import RMSNorm

EPS = 1e-6


def norm(size: int, dtype: torch.dtype) -> RMSNorm:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=True)
    built = RMSNorm(config, size, eps=EPS)
    with torch.no_grad():
        built.weight.copy_(random(size, seed=1).exp())
    return built


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(37, 1, 128), (37, 1, 4, 24), (0, 1, 128)])
def test_values_are_torchs_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, x = norm(shape[-1], dtype), random(*shape, seed=0).to(dtype)
    assert torch.equal(ours(x), F.rms_norm(x, shape[-1:], ours.weight, EPS))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(37, 1, 128), (37, 1, 4, 24)])
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    ours, x = norm(shape[-1], dtype), random(*shape, seed=0).to(dtype).requires_grad_()
    upstream = random(*shape, seed=2).to(dtype)
    ours(x).backward(upstream)
    exact_x, exact_weight = x.detach().double().requires_grad_(), ours.weight.detach().double().requires_grad_()
    F.rms_norm(exact_x, shape[-1:], exact_weight, EPS).backward(upstream.double())
    for gradient, exact in ((x.grad, exact_x.grad), (ours.weight.grad, exact_weight.grad)):
        assert gradient is not None and exact is not None and gradient.dtype == dtype
        assert (gradient - exact).norm() <= rounding * exact.norm()


def test_a_token_of_zeros() -> None:
    """Next to nothing is divided by the root of eps, not by zero."""
    ours, x = norm(8, torch.float32), torch.zeros(2, 8, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, ours.weight / EPS**0.5)


def test_tensor_parallel_ranks_sum_its_gradient() -> None:
    assert norm(8, torch.float32).weight.sequence_parallel is True  # type: ignore[attr-defined]
