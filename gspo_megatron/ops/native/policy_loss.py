"""The policy loss and means over packed sequences.

Sums of each sequence are float64 [2, S]: of its values, and of its response tokens. Context-parallel ranks add
theirs up between two kernels; without them one kernel does all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.ops.native.extension import DTYPE_CODES, address, all_reduce_by_name, group_name, launching
from gspo_megatron.ops.reference import Level, PolicyLossStats, statistics_dtype


def _pack(extension: Any, response_mask: Tensor, cu_seqlens: Tensor) -> Any:
    return extension.Pack(response_mask.numel(), cu_seqlens.numel() - 1, address(response_mask), address(cu_seqlens))


def _sums(values: Tensor, subtrahend: Tensor | None, response_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[2, S]: Σ (values - subtrahend) over each sequence's response tokens here, and how many there are."""
    sums = values.new_empty((2, cu_seqlens.numel() - 1), dtype=torch.float64)
    with launching(values.device) as (extension, place):
        pack = _pack(extension, response_mask, cu_seqlens)
        extension.sequence_sums(
            place, pack, DTYPE_CODES[values.dtype], address(values), address(subtrahend), address(sums)
        )
    return sums


# -- Policy loss --------------------------------------------------------------------------------------------------


@torch.library.custom_op("gspo_megatron::sequence_policy_loss", mutates_args=())
def _sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    num_sequences: int,
    token_level: bool,
    cp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], log_ratio [S], clipped [S], clipped_tokens [T], num_response_tokens [S], and gradient [T]."""
    num_local = cu_seqlens.numel() - 1
    dtype = logprobs.dtype
    if cp_group:
        sums = all_reduce_by_name(_sums(logprobs, old_logprobs, response_mask, cu_seqlens), cp_group)
    else:
        sums = logprobs.new_empty((2, num_local), dtype=torch.float64)
    gradient = torch.empty_like(logprobs)
    terms = sums.new_empty(num_local)
    loss = sums.new_empty(())
    log_ratio = logprobs.new_empty(num_local)
    clipped_tokens = torch.empty_like(response_mask)
    num_clipped, num_response_tokens = cu_seqlens.new_empty(num_local), cu_seqlens.new_empty(num_local)
    with launching(logprobs.device) as (extension, place):
        extension.policy_loss(
            place=place,
            pack=_pack(extension, response_mask, cu_seqlens),
            dtype=DTYPE_CODES[dtype],
            logprobs=address(logprobs),
            old_logprobs=address(old_logprobs),
            advantages=address(advantages),
            advantage_per_token=advantages.numel() != num_local,
            weights=address(weights),
            token_level=token_level,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            num_global=float(num_sequences),
            sums=address(sums),
            sums_are_given=bool(cp_group),
            gradient=address(gradient),
            terms=address(terms),
            loss=address(loss),
            log_ratio=address(log_ratio),
            clipped_tokens=address(clipped_tokens),
            num_clipped=address(num_clipped),
            num_response_tokens=address(num_response_tokens),
        )
    all_reduce_by_name(num_clipped, cp_group)
    return loss.to(dtype), log_ratio, num_clipped > 0, clipped_tokens, num_response_tokens, gradient


@_sequence_policy_loss.register_fake
def _(
    logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor, cu_seqlens: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_local = cu_seqlens.shape[0] - 1
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(num_local),
        response_mask.new_empty(num_local),
        torch.empty_like(response_mask),
        cu_seqlens.new_empty(num_local),
        torch.empty_like(logprobs),
    )


@torch.library.custom_op("gspo_megatron::scaled_gradient", mutates_args=())
def _scaled_gradient(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """Their product. An operator of its own, so that a second derivative raises: the gradient is taken for constant."""
    return gradient * grad_loss


@_scaled_gradient.register_fake
def _(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[5])
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_policy_loss(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # The forward pass knew the gradient up to a factor: backward has no collective, and a rank without response
    # tokens still takes part in it, with zeros.
    (gradient,) = ctx.saved_tensors
    return _scaled_gradient(gradient, grad_loss), *[None] * 11


_sequence_policy_loss.register_autograd(_backward_of_policy_loss, setup_context=_save_policy_loss)


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    num_sequences: int | None,
    level: Level,
    weights: Tensor | None,
    cp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, PolicyLossStats]:
    """`ops.sequence_policy_loss` over csrc; arguments as there, checked."""
    dtype = torch.promote_types(logprobs.dtype, old_logprobs.dtype)
    loss, log_ratio, *rest, _ = _sequence_policy_loss(
        logprobs.to(dtype).contiguous(),
        old_logprobs.detach().to(dtype).contiguous(),
        response_mask.contiguous(),
        cu_seqlens.long().contiguous(),
        advantages.detach().to(dtype).contiguous(),
        None if weights is None else weights.detach().to(dtype).contiguous(),
        clip_low,
        clip_high,
        math.inf if dual_clip is None else dual_clip,
        cu_seqlens.numel() - 1 if num_sequences is None else num_sequences,
        level == "token",
        group_name(cp_group),
    )
    return loss.to(logprobs.dtype), PolicyLossStats(log_ratio.to(logprobs.dtype), *rest)


# -- Mean over sequences ------------------------------------------------------------------------------------------


@torch.library.custom_op("gspo_megatron::sequence_mean", mutates_args=())
def _sequence_mean(
    values: Tensor, response_mask: Tensor, cu_seqlens: Tensor, num_sequences: int, cp_group: str
) -> tuple[Tensor, Tensor]:
    """The mean [], and what a response token of each sequence weighs in it [S]."""
    sums, num_tokens = _sums(values, None, response_mask, cu_seqlens)
    all_reduce_by_name(num_tokens, cp_group)
    weight = 1.0 / (num_tokens.clamp(min=1.0) * num_sequences)
    return (sums * weight).sum().to(values.dtype), weight


@_sequence_mean.register_fake
def _(values: Tensor, response_mask: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(()), values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float64)


@torch.library.custom_op("gspo_megatron::sequence_fill", mutates_args=())
def _sequence_fill(scale: Tensor, response_mask: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """scale [S] at the response tokens of each sequence, 0 elsewhere; [T] of the dtype of `like`."""
    out = torch.empty_like(like)
    with launching(out.device) as (extension, place):
        pack = _pack(extension, response_mask, cu_seqlens)
        extension.sequence_fill(place, pack, address(scale), DTYPE_CODES[out.dtype], address(out))
    return out


@_sequence_fill.register_fake
def _(scale: Tensor, response_mask: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, response_mask, cu_seqlens, *_ = inputs
    ctx.save_for_backward(output[1], response_mask, cu_seqlens, values)
    ctx.mark_non_differentiable(output[1])


def _backward_of_mean(ctx: Any, grad_mean: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    weight, response_mask, cu_seqlens, values = ctx.saved_tensors
    return _sequence_fill(weight * grad_mean, response_mask, cu_seqlens, values), *[None] * 4


_sequence_mean.register_autograd(_backward_of_mean, setup_context=_save_mean)


def sequence_mean(
    values: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    num_sequences: int | None,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """`ops.sequence_mean` over csrc; arguments as there, checked."""
    mean, _ = _sequence_mean(
        values.to(statistics_dtype(values)).contiguous(),
        response_mask.contiguous(),
        cu_seqlens.long().contiguous(),
        cu_seqlens.numel() - 1 if num_sequences is None else num_sequences,
        group_name(cp_group),
    )
    return mean
