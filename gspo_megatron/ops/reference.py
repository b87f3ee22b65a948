"""The operations in plain torch: the definition that every native kernel must equal.

Nothing here waits for the device: there is no .item(), no .tolist() and no branch on a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Level = Literal["sequence", "token"]

# exp(-1e4) is 0 in float32 and in float64. Shifted logits of -inf are raised to it where they meet a
# product, because 0 · (-1e4) is 0 and 0 · (-inf) is NaN.
_FLOOR = -1e4

# Elements of a temporary. On a CPU, statistics run over blocks that fit the cache (about 3 times as fast as over
# whole tensors), and products over blocks large enough for the GEMM, without ever holding [T, Vl].
_STATISTICS_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}
_PRODUCT_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class PolicyLossStats:
    """What the clip did, for metrics. Detached; nothing in it waits for the device."""

    log_ratio: Tensor  # [S] length-normalised log s of each sequence, at either level; 0 without response tokens
    clipped: Tensor  # [S] bool, whether any response token's term has no gradient because of a clip
    clipped_tokens: Tensor  # [T] bool, this rank's tokens
    num_response_tokens: Tensor  # [S] int64, over all context-parallel ranks


# ---------------------------------------------------------------------------------------------------------
# Token log-probabilities over a vocabulary that may be split over ranks
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """This rank's part of the softmax."""

    start: int  # vocabulary index of the first local column
    width: int  # local columns inside the softmax; the columns behind them are padding
    first_target: int  # a target outside [first_target, end_target) belongs to no rank
    end_target: int
    temperature: float
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        columns: int,
        *,
        temperature: float,
        vocab_start: int,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
    ) -> Shard:
        ranks = 1 if group is None else group.size()
        columns_end = vocab_start + columns if group is None else ranks * columns
        end = columns_end if vocab_size is None else min(vocab_size, columns_end)
        return cls(
            start=vocab_start,
            width=min(max(end - vocab_start, 0), columns),
            first_target=vocab_start if group is None else 0,
            end_target=end,
            temperature=temperature,
            group=group,
        )

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each target, clamped to a readable one [T], and whether the target is here [T]."""
        column = targets - self.start
        return column.clamp(0, max(self.width - 1, 0)), (column >= 0) & (column < self.width)


def all_reduce(values: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    """Reduce in place over the group; without one, or alone in it, do nothing."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def _row_blocks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    size = max(elements // max(columns, 1), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def statistics_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _without_infinity(maximum: Tensor) -> Tensor:
    """A row whose columns are all -inf is shifted by 0, so that it has no -inf - (-inf)."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def _local_statistics(logits: Tensor, targets: Tensor, shard: Shard) -> Tensor:
    """[4, T] over the local columns: max m, Σ e^x, Σ x·e^x with x = z - m, and the target's z (0 off-shard)."""
    dtype = statistics_dtype(logits)
    statistics = logits.new_zeros((4, logits.shape[0]), dtype=dtype)
    if shard.width == 0:  # all columns of this rank are padding
        statistics[0] = -math.inf
        return statistics
    column, is_local = shard.locate(targets)
    for rows in _row_blocks(logits.shape[0], shard.width, _STATISTICS_ELEMENTS[logits.device.type]):
        scaled = logits[rows, : shard.width].to(dtype).div(shard.temperature)
        statistics[0, rows] = maximum = scaled.amax(-1)
        target = scaled.gather(1, column[rows, None]).squeeze(1)
        statistics[3, rows] = torch.where(is_local[rows], target, 0.0)
        shifted = scaled.sub_(_without_infinity(maximum)[:, None]).clamp_(min=_FLOOR)
        weight = shifted.exp()
        statistics[1, rows] = weight.sum(-1)
        statistics[2, rows] = weight.mul_(shifted).sum(-1)
    return statistics


def _merge(statistics: Tensor, targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From each rank's statistics: the common shift, log Σ e^(z - shift), log-probability, entropy; all [T].

    The sum holds e^0 of the largest logit, so that it is at least 1: a log-probability is never above 0.
    """
    local_max, sum_exp, sum_x_exp, target = statistics
    maximum = all_reduce(local_max.clone(), dist.ReduceOp.MAX, shard.group)
    shift = _without_infinity(maximum)
    delta = (local_max - shift).clamp(min=_FLOOR)  # a rank of -inf columns has the weight exp(-1e4) = 0
    scale = delta.exp()
    _, is_local = shard.locate(targets)
    sums = torch.stack(
        [scale * sum_exp, scale * (sum_x_exp + delta * sum_exp), torch.where(is_local, target - shift, 0.0)]
    )
    sum_exp, sum_x_exp, target = all_reduce(sums, dist.ReduceOp.SUM, shard.group)
    is_impossible = maximum == -math.inf
    log_sum = sum_exp.log().masked_fill(is_impossible, 0.0)
    entropy = (log_sum - sum_x_exp / sum_exp).masked_fill(is_impossible, 0.0)
    is_foreign = (targets < shard.first_target) | (targets >= shard.end_target)
    logprobs = (target - log_sum).masked_fill(is_foreign, math.nan)
    return shift, log_sum, logprobs, entropy


def no_gradient(grad_logprobs: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """[T] bool: the token asks for nothing. It then gets exactly 0, whatever its logits hold."""
    quiet = grad_logprobs == 0
    return quiet if grad_entropy is None else quiet & (grad_entropy == 0)


def _write_logits_gradient(
    out: Tensor,  # [T, Vl], may be the logits themselves
    logits: Tensor,  # [T, Vl]
    targets: Tensor,  # [T]
    shift: Tensor,  # [T]
    log_sum: Tensor,  # [T]
    entropy: Tensor,  # [T]
    grad_logprobs: Tensor,  # [T]
    grad_entropy: Tensor | None,  # [T]
    shard: Shard,
) -> None:
    """out = 1/temperature · [ g_logp (1{v = target} - p_v) - g_ent p_v (log p_v + H) ], 0 in padded columns."""
    out[:, shard.width :] = 0
    if shard.width == 0:
        return
    dtype = statistics_dtype(logits)
    column, is_local = shard.locate(targets)
    quiet = no_gradient(grad_logprobs, grad_entropy)
    grad_logprobs = grad_logprobs.to(dtype) / shard.temperature
    at_target = torch.where(is_local, grad_logprobs, 0.0)
    if grad_entropy is not None:
        grad_entropy = grad_entropy.to(dtype) / shard.temperature
    for rows in _row_blocks(logits.shape[0], shard.width, _STATISTICS_ELEMENTS[logits.device.type]):
        log_p = logits[rows, : shard.width].to(dtype).div(shard.temperature)
        log_p.sub_(shift[rows, None]).sub_(log_sum[rows, None])
        gradient = log_p.exp()
        if grad_entropy is None:
            gradient.mul_(-grad_logprobs[rows, None])
        else:
            towards_uniform = log_p.clamp_(min=_FLOOR).add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
            gradient.mul_(towards_uniform.sub_(grad_logprobs[rows, None]))
        gradient.scatter_add_(1, column[rows, None], at_target[rows, None])
        out[rows, : shard.width] = gradient.masked_fill_(quiet[rows, None], 0.0)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: Shard, inplace_backward: bool
    ) -> tuple[Tensor, Tensor]:
        statistics = _local_statistics(logits, targets, shard)
        shift, log_sum, logprobs, entropy = _merge(statistics, targets, shard)
        ctx.save_for_backward(logits, targets, shift, log_sum, entropy)
        ctx.shard, ctx.inplace_backward = shard, inplace_backward
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, shift, log_sum, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(shift)
        # Overwriting bumps the version of the saved logits: a second backward raises instead of reading gradients.
        gradient = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        _write_logits_gradient(
            gradient, logits, targets, shift, log_sum, entropy, grad_logprobs, grad_entropy, ctx.shard
        )
        return gradient, None, None, None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Definition of `ops.token_logprobs`; arguments as there, unchecked."""
    shard = Shard.of(
        logits.shape[1], temperature=temperature, vocab_start=vocab_start, vocab_size=vocab_size, group=group
    )
    return _TokenLogprobs.apply(logits, targets, shard, inplace_backward)


def _operand(values: Tensor) -> Tensor:
    """A matrix as the product wants it: a CPU has no half-precision product with a float32 result."""
    is_half = values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if is_half and values.device.type == "cpu" else values


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and kept in float32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


class _LinearLogprobs(torch.autograd.Function):
    """Blocks of rows of the logits are made twice, in forward and in backward; [T, Vl] is never held."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: Shard,
        reduce_hidden_grad: bool,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head = _operand(weight[: shard.width])
        statistics = hidden.new_empty((4, hidden.shape[0]), dtype=statistics_dtype(hidden))
        for rows in _row_blocks(hidden.shape[0], shard.width, _PRODUCT_ELEMENTS[hidden.device.type]):
            logits = _product(_operand(hidden[rows]), head.t())
            statistics[:, rows] = _local_statistics(logits, targets[rows], shard)
        shift, log_sum, logprobs, entropy = _merge(statistics, targets, shard)
        ctx.save_for_backward(hidden, weight, targets, shift, log_sum, entropy)
        ctx.shard, ctx.reduce_hidden_grad, ctx.weight_grad = shard, reduce_hidden_grad, weight_grad
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, shift, log_sum, entropy = ctx.saved_tensors
        shard: Shard = ctx.shard
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(shift)
        quiet = no_gradient(grad_logprobs, grad_entropy)
        head = _operand(weight[: shard.width])
        grad_hidden = torch.zeros_like(hidden, dtype=shift.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=shift.dtype) if needs_weight else None
        for rows in _row_blocks(hidden.shape[0], shard.width, _PRODUCT_ELEMENTS[hidden.device.type]):
            # A NaN hidden state of a token without gradient must not reach the weight through 0 · NaN.
            inputs = _operand(hidden[rows].masked_fill(quiet[rows, None], 0.0))
            logits = _product(inputs, head.t())
            _write_logits_gradient(
                logits,
                logits,
                targets[rows],
                shift[rows],
                log_sum[rows],
                entropy[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                shard,
            )
            grad_logits = logits.to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _product(grad_logits, head)
            if grad_weight is not None:
                grad_weight[: shard.width] += _product(grad_logits.t(), inputs)
        if grad_hidden is not None:
            if ctx.reduce_hidden_grad:
                all_reduce(grad_hidden, dist.ReduceOp.SUM, shard.group)  # in float32, before any rounding
            grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None and ctx.weight_grad is not None:
            ctx.weight_grad += grad_weight
            grad_weight = None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad: Tensor | None = None,
    skip_zero_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Definition of `ops.linear_logprobs`; arguments as there, unchecked. Computes every row, skipped or not."""
    shard = Shard.of(
        weight.shape[0], temperature=temperature, vocab_start=vocab_start, vocab_size=vocab_size, group=group
    )
    return _LinearLogprobs.apply(hidden, weight, targets, shard, reduce_hidden_grad, weight_grad)


# ---------------------------------------------------------------------------------------------------------
# Sums over the sequences of a pack
# ---------------------------------------------------------------------------------------------------------


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: the sequence each packed token belongs to; S for tokens before the first and behind the last."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    found = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    return torch.where(tokens < cu_seqlens[0], cu_seqlens.numel() - 1, found)


def sums_per_sequence(values: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    """[k, T] float64 → [k, S+1] sums; the last column gathers what lies behind the last sequence."""
    return values.new_zeros((values.shape[0], num_sequences + 1)).index_add_(1, sequences, values)


@dataclass(frozen=True)
class _PolicyLossSettings:
    clip_low: float
    clip_high: float
    dual_clip: float | None
    num_sequences: int | None
    level: Level
    cp_group: dist.ProcessGroup | None


class _SequencePolicyLoss(torch.autograd.Function):
    """The forward pass knows the gradient of every token up to a factor, so that backward has no collective
    and a rank without response tokens still takes part in it, with zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        old_logprobs: Tensor,
        response_mask: Tensor,
        cu_seqlens: Tensor,
        advantages: Tensor,
        weights: Tensor | None,
        settings: _PolicyLossSettings,
    ) -> tuple[Tensor, ...]:
        num_local = cu_seqlens.numel() - 1
        sequences = sequence_of_token(cu_seqlens, logprobs.numel())
        mask = response_mask & (sequences < num_local)

        def select(values: Tensor) -> Tensor:  # before any arithmetic: NaN · 0 is NaN
            return torch.where(mask, values.double(), 0.0)

        # Subtracted per token, then summed, in float64: a float32 difference of sums is 200 times worse.
        token_log_ratio = select(logprobs) - select(old_logprobs)
        sums = sums_per_sequence(torch.stack([token_log_ratio, mask.double()]), sequences, num_local)
        sum_log_ratio, num_tokens = all_reduce(sums, dist.ReduceOp.SUM, settings.cp_group)
        length = num_tokens.clamp(min=1.0)
        sequence_log_ratio = sum_log_ratio / length  # [S+1] log s_i
        log_ratio = token_log_ratio if settings.level == "token" else sequence_log_ratio[sequences]

        if advantages.numel() == num_local:
            advantages = F.pad(advantages, (0, 1))[sequences]
        advantages = select(advantages)
        scale = advantages if weights is None else advantages * select(weights)
        divisor = length[sequences] * (num_local if settings.num_sequences is None else settings.num_sequences)

        # A clip of 3e-4 is decided on log s, which keeps all its digits, not on s, which has spent them on the 1.
        positive, negative = advantages > 0, advantages < 0
        clipped = (positive & (log_ratio > math.log1p(settings.clip_high))) | (
            negative & (log_ratio < math.log1p(-settings.clip_low))
        )
        if settings.dual_clip is not None:
            clipped |= negative & (log_ratio > math.log(settings.dual_clip))
        ratio = log_ratio.exp()
        bounded = torch.where(
            positive,
            ratio.clamp(max=1.0 + settings.clip_high),
            ratio.clamp(min=1.0 - settings.clip_low, max=settings.dual_clip),
        )
        is_idle = scale == 0  # 0 · inf is NaN: a ratio without an advantage counts for nothing, however large
        loss = -(torch.where(is_idle, 0.0, bounded * scale) / divisor).sum()
        gradient = torch.where(is_idle | clipped, 0.0, -ratio * scale / divisor)
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype

        num_clipped = sums_per_sequence(clipped.double()[None], sequences, num_local)
        num_clipped = all_reduce(num_clipped, dist.ReduceOp.SUM, settings.cp_group)[0]
        outputs = (
            loss.to(logprobs.dtype),
            sequence_log_ratio[:-1].to(logprobs.dtype),
            num_clipped[:-1] > 0,
            clipped,
            num_tokens[:-1].long(),
        )
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss.double()).to(ctx.dtype), None, None, None, None, None, None


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    num_sequences: int | None = None,
    level: Level = "sequence",
    weights: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, PolicyLossStats]:
    """Definition of `ops.sequence_policy_loss`; arguments as there, unchecked."""
    settings = _PolicyLossSettings(clip_low, clip_high, dual_clip, num_sequences, level, cp_group)
    loss, *stats = _SequencePolicyLoss.apply(
        logprobs, old_logprobs, response_mask, cu_seqlens, advantages, weights, settings
    )
    return loss, PolicyLossStats(*stats)


def sequence_mean(
    values: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    num_sequences: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Definition of `ops.sequence_mean`; arguments as there, unchecked."""
    num_local = cu_seqlens.numel() - 1
    sequences = sequence_of_token(cu_seqlens, values.numel())
    mask = response_mask & (sequences < num_local)
    num_tokens = sums_per_sequence(mask.double()[None], sequences, num_local)
    length = all_reduce(num_tokens, dist.ReduceOp.SUM, cp_group)[0].clamp(min=1.0)
    divisor = length[sequences] * (num_local if num_sequences is None else num_sequences)
    total = (torch.where(mask, values.double(), 0.0) / divisor).sum()
    return total.to(statistics_dtype(values))
