"""Token log-probabilities, from logits and from hidden states.

Statistics of a row are float64 [4, T] of each rank's columns, and [3, T] once merged (csrc/launchers.h names them):
little beside the logits, and exact enough for 1 - p of a token that is all but certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.ops.native.extension import DTYPE_CODES, address, all_reduce_by_name, group_name, launching
from gspo_megatron.ops.reference import Shard, no_gradient, statistics_dtype

# Elements of the logits that linear_logprobs holds at a time: enough for the GEMM, little beside its gradients.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}


@dataclass(frozen=True)
class _Columns:
    """Some of a rank's columns of the softmax."""

    start: int  # vocabulary index of the first
    width: int  # columns inside the softmax
    temperature: float

    def describe(self, extension: Any) -> Any:
        return extension.Shard(self.start, self.width, 1.0 / self.temperature)


def _matrix(extension: Any, values: Tensor) -> Any:
    assert values.stride(1) == 1 or values.shape[1] == 1
    rows, columns = values.shape
    return extension.Matrix(values.data_ptr(), DTYPE_CODES[values.dtype], rows, columns, values.stride(0))


def _add_statistics(statistics: Tensor, logits: Tensor, targets: Tensor, columns: _Columns) -> None:
    """Merge what these columns' logits [T, ≥ width] contribute into the statistics [4, T]."""
    with launching(logits.device) as (extension, place):
        extension.logits_stats(
            place,
            _matrix(extension, logits),
            address(targets),
            columns.describe(extension),
            True,
            address(statistics),
        )


def _no_statistics(targets: Tensor) -> Tensor:
    """[4, T] statistics of no column."""
    statistics = targets.new_zeros((4, targets.shape[0]), dtype=torch.float64)
    statistics[0] = -math.inf
    return statistics


def _finish(
    statistics: Tensor,  # [4, T]
    targets: Tensor,
    columns: _Columns,  # all of this rank's
    first_target: int,
    end_target: int,
    group: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the ranks' statistics: log-probabilities [T], entropies [T], and what backward needs [3, T]."""
    tokens = targets.shape[0]
    maximum = statistics[0].clone()
    all_reduce_by_name(maximum, group, dist.ReduceOp.MAX)
    sums = torch.empty_like(statistics[:3])
    logprobs = targets.new_empty(tokens, dtype=dtype)
    entropy = torch.empty_like(logprobs)
    rows = torch.empty_like(sums)
    with launching(targets.device) as (extension, place):
        extension.merge_stats(
            place,
            tokens,
            address(targets),
            columns.describe(extension),
            address(statistics),
            address(maximum),
            address(sums),
        )
        all_reduce_by_name(sums, group)
        extension.finish_stats(
            place,
            tokens,
            address(targets),
            first_target,
            end_target,
            address(maximum),
            address(sums),
            DTYPE_CODES[dtype],
            address(logprobs),
            address(entropy),
            address(rows),
        )
    return logprobs, entropy, rows


def _write_gradient(
    out: Tensor,  # [T, ≥ width], may be the logits themselves
    logits: Tensor,  # [T, ≥ width]
    targets: Tensor,
    rows: Tensor,  # [3, T]
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    columns: _Columns,
) -> None:
    dtype = statistics_dtype(logits)
    grad_logprobs = torch.zeros_like(rows[0], dtype=dtype) if grad_logprobs is None else grad_logprobs.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    with launching(logits.device) as (extension, place):
        extension.logits_backward(
            place,
            _matrix(extension, logits),
            _matrix(extension, out),
            address(targets),
            columns.describe(extension),
            address(rows),
            DTYPE_CODES[dtype],
            address(grad_logprobs),
            address(grad_entropy),
        )


# -- From logits --------------------------------------------------------------------------------------------------


@torch.library.custom_op("gspo_megatron::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    start: int,
    width: int,
    first_target: int,
    end_target: int,
    group: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = _Columns(start, width, temperature)
    statistics = _no_statistics(targets)
    _add_statistics(statistics, logits, targets, columns)
    return _finish(statistics, targets, columns, first_target, end_target, group, statistics_dtype(logits))


@_token_logprobs.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    result = logits.new_empty(tokens, dtype=statistics_dtype(logits))
    return result, torch.empty_like(result), logits.new_empty((3, tokens), dtype=torch.float64)


@torch.library.custom_op("gspo_megatron::logits_gradient", mutates_args=())
def _logits_gradient(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    start: int,
    width: int,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    columns = _Columns(start, width, temperature)
    _write_gradient(out, logits, targets, rows, grad_logprobs, grad_entropy, columns)
    return out


@_logits_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("gspo_megatron::logits_gradient_", mutates_args={"logits"})
def _logits_gradient_(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    start: int,
    width: int,
) -> None:
    columns = _Columns(start, width, temperature)
    _write_gradient(logits, logits, targets, rows, grad_logprobs, grad_entropy, columns)


def _save_token_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, start, width, *_, inplace_backward = inputs
    ctx.save_for_backward(logits, targets, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.columns, ctx.inplace_backward = (temperature, start, width), inplace_backward
    ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward


def _backward_of_token_logprobs(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    logits, targets, rows = ctx.saved_tensors
    if ctx.inplace_backward:
        # Overwriting bumps the version of the saved logits: a second backward raises instead of reading gradients.
        gradient = logits.detach()
        _logits_gradient_(gradient, targets, rows, grad_logprobs, grad_entropy, *ctx.columns)
    else:
        gradient = _logits_gradient(logits, targets, rows, grad_logprobs, grad_entropy, *ctx.columns)
    return gradient, *[None] * 8


_token_logprobs.register_autograd(_backward_of_token_logprobs, setup_context=_save_token_logprobs)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.token_logprobs` over csrc; arguments as there, checked."""
    shard = Shard.of(
        logits.shape[1], temperature=temperature, vocab_start=vocab_start, vocab_size=vocab_size, group=group
    )
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        logits = logits.contiguous()
    logprobs, entropy, _ = _token_logprobs(
        logits,
        targets.long().contiguous(),
        temperature,
        shard.start,
        shard.width,
        shard.first_target,
        shard.end_target,
        group_name(group),
        inplace_backward,
    )
    return logprobs, entropy


# -- From hidden states -------------------------------------------------------------------------------------------


def _operand(values: Tensor) -> Tensor:
    """A matrix as the product wants it: a CPU has no half-precision product with a float32 result."""
    is_half = values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if is_half and values.device.type == "cpu" else values


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b or out += a @ b, accumulated in float32 (float64 for float64) and rounded once."""
    if out.dtype == a.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif a.dtype == torch.float32:  # a half-precision result on a CPU
        out.add_(a @ b) if accumulate else out.copy_(a @ b)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class _Chunks:
    """The logits, a chunk of the vocabulary at a time, in one piece of memory.

    Chunks of the vocabulary, not of the tokens: each part of the weight's gradient is then written once.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, columns: _Columns) -> None:
        self.hidden, self.weight, self.columns = hidden, weight, columns  # hidden is an operand
        tokens = max(hidden.shape[0], 1)
        columns_at_once = _CHUNK_ELEMENTS[hidden.device.type] // tokens
        if columns_at_once > 64:
            columns_at_once -= columns_at_once % 64  # rows of the chunk start where vectors may
        self.size = max(min(columns_at_once, columns.width), 1)
        self.memory = hidden.new_empty(tokens * self.size, dtype=statistics_dtype(hidden))

    def __iter__(self) -> Iterator[tuple[slice, _Columns, Tensor, Tensor]]:
        """Rows of the weight, their columns of the softmax, those rows as an operand [C, H], and the logits [T, C]."""
        for begin in range(0, self.columns.width, self.size):
            rows = slice(begin, min(begin + self.size, self.columns.width))
            width = rows.stop - begin
            head = _operand(self.weight[rows])
            logits = self.memory[: self.hidden.shape[0] * width].view(-1, width)
            _multiply(logits, self.hidden, head.t())
            yield rows, _Columns(self.columns.start + begin, width, self.columns.temperature), head, logits


@torch.library.custom_op("gspo_megatron::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_grad: Tensor | None,
    temperature: float,
    start: int,
    width: int,
    first_target: int,
    end_target: int,
    group: str,
    hidden_group: str,
    skip_zero_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = _Columns(start, width, temperature)
    statistics = _no_statistics(targets)
    for _, chunk, _, logits in _Chunks(_operand(hidden), weight, columns):
        _add_statistics(statistics, logits, targets, chunk)
    return _finish(statistics, targets, columns, first_target, end_target, group, statistics_dtype(hidden))


@_linear_logprobs.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    result = hidden.new_empty(tokens, dtype=statistics_dtype(hidden))
    return result, torch.empty_like(result), hidden.new_empty((3, tokens), dtype=torch.float64)


@torch.library.custom_op("gspo_megatron::linear_gradients", mutates_args={"weight_grad"})
def _linear_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,  # [3, T]
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    weight_grad: Tensor | None,  # [Vl, H] the weight's gradient is added here; none: it is returned
    temperature: float,
    start: int,
    width: int,
    hidden_group: str,
    needs_hidden: bool,
    needs_weight: bool,
    skip_zero_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, each empty where it is not needed."""
    dtype = statistics_dtype(hidden)
    if grad_logprobs is None:
        grad_logprobs = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    quiet = no_gradient(grad_logprobs, grad_entropy)
    total_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if needs_weight and weight_grad is None else 0)
    if grad_weight.numel() > 0:
        grad_weight[width:] = 0  # rows of padding

    if skip_zero_rows:
        active = (~quiet).nonzero().squeeze(1)  # waits for the device, where that is not the CPU
        inputs, targets, rows = hidden[active], targets[active], rows[:, active]
        grad_logprobs = grad_logprobs[active]
        grad_entropy = None if grad_entropy is None else grad_entropy[active]
    else:
        # A NaN hidden state of a token without gradient must not reach the weight through 0 · NaN.
        inputs = hidden.masked_fill(quiet[:, None], 0.0)
    inputs = _operand(inputs)
    grad_hidden = torch.zeros_like(inputs, dtype=dtype) if skip_zero_rows and needs_hidden else total_hidden

    for slab, chunk, head, logits in _Chunks(inputs, weight, _Columns(start, width, temperature)):
        # Half-precision products read half-precision gradients; float32 ones go where the logits are.
        grad_logits = logits if inputs.dtype == dtype else torch.empty_like(logits, dtype=inputs.dtype)
        _write_gradient(grad_logits, logits, targets, rows, grad_logprobs, grad_entropy, chunk)
        if needs_hidden:
            _multiply(grad_hidden, grad_logits, head, accumulate=True)
        if needs_weight and weight_grad is not None:
            _multiply(weight_grad[slab], grad_logits.t(), inputs, accumulate=True)
        elif needs_weight:
            _multiply(grad_weight[slab], grad_logits.t(), inputs)

    if skip_zero_rows and needs_hidden:
        total_hidden.index_copy_(0, active, grad_hidden)
    if needs_hidden:
        all_reduce_by_name(total_hidden, hidden_group)  # before any rounding
    return total_hidden.to(hidden.dtype), grad_weight


@_linear_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    weight_grad: Tensor | None,
    temperature: float,
    start: int,
    width: int,
    hidden_group: str,
    needs_hidden: bool,
    needs_weight: bool,
    skip_zero_rows: bool,
) -> tuple[Tensor, Tensor]:
    is_returned = needs_weight and weight_grad is None
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if is_returned else 0)


def _save_linear_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, weight_grad, temperature, start, width, *_, hidden_group, skip_zero_rows = inputs
    ctx.save_for_backward(hidden, weight, targets, output[2])
    ctx.mark_non_differentiable(output[2])
    # Not among the saved tensors: other micro-batches add to it before this one's backward.
    ctx.weight_grad = weight_grad
    ctx.columns, ctx.hidden_group, ctx.skip_zero_rows = (temperature, start, width), hidden_group, skip_zero_rows
    ctx.set_materialize_grads(False)


def _backward_of_linear_logprobs(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, rows = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _linear_gradients(
        hidden,
        weight,
        targets,
        rows,
        grad_logprobs,
        grad_entropy,
        ctx.weight_grad,
        *ctx.columns,
        ctx.hidden_group,
        needs_hidden,
        needs_weight,
        ctx.skip_zero_rows,
    )
    is_returned = needs_weight and ctx.weight_grad is None
    return grad_hidden if needs_hidden else None, grad_weight if is_returned else None, *[None] * 10


_linear_logprobs.register_autograd(_backward_of_linear_logprobs, setup_context=_save_linear_logprobs)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool,
    weight_grad: Tensor | None,
    skip_zero_rows: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_logprobs` over csrc; arguments as there, checked."""
    shard = Shard.of(
        weight.shape[0], temperature=temperature, vocab_start=vocab_start, vocab_size=vocab_size, group=group
    )
    logprobs, entropy, _ = _linear_logprobs(
        hidden,
        weight,
        targets.long().contiguous(),
        weight_grad,
        temperature,
        shard.start,
        shard.width,
        shard.first_target,
        shard.end_target,
        group_name(group),
        group_name(group) if reduce_hidden_grad else "",
        skip_zero_rows,
    )
    return logprobs, entropy
