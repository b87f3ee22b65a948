"""A value whose gradient was computed before autograd asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The detached `value` [], in the dtype of `inputs`, with the derivative `gradient` by `inputs`.

    Backward has no collective and reads nothing but `gradient`, which has the shape of `inputs` and any float dtype: it
    is multiplied in its own and then converted.
    """
    return _KnownGradient.apply(inputs, value, gradient)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = inputs.dtype
        return value.to(inputs.dtype, copy=True)  # Megatron may write over it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_value.to(gradient.dtype)).to(ctx.dtype), None, None
