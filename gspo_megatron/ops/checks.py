"""Arguments of the operations, checked without reading a device: shapes, dtypes, ranges of plain numbers."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

_LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_shape(name: str, values: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be [{letters}] = {shape}")


def _check_device(name: str, values: Tensor, device: torch.device) -> None:
    if values.device != device:
        raise ValueError(f"{name} is on {values.device}, the first argument on {device}; move them to one device")


def _check_integers(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {values.dtype}; it must be int64 or int32")


def _check_matrix(name: str, values: Tensor, letters: str) -> None:
    if values.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must have two dimensions [{letters}]")
    if values.dtype not in _LOGITS_DTYPES:
        raise ValueError(f"{name} has dtype {values.dtype}; it must be one of {[str(d) for d in _LOGITS_DTYPES]}")


def _check_softmax(
    columns: int,
    targets: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    _check_integers("targets", targets)
    if not (0 < temperature < math.inf and 1 / temperature < math.inf):
        raise ValueError(f"temperature={temperature} must be positive and finite, and so must be its inverse")
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start} must be at least 0")
    if group is not None and vocab_start != group.rank() * columns:
        raise ValueError(
            f"vocab_start={vocab_start} on rank {group.rank()} of the group, with {columns} columns; equal shards in "
            f"rank order start at {group.rank() * columns} here"
        )
    if columns < 1:
        raise ValueError("the vocabulary shard has no column")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1")
    if group is None and vocab_size is not None and vocab_size <= vocab_start:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no column of this shard, which starts at vocab_start={vocab_start}; "
            "pass the group over which the vocabulary is split"
        )


def check_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise ValueError unless the arguments of `ops.token_logprobs` fit each other."""
    _check_matrix("logits", logits, "T, Vl")
    _check_shape("targets", targets, (logits.shape[0],), "T")
    _check_device("targets", targets, logits.device)
    _check_softmax(
        logits.shape[1],
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
    )


def check_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    weight_grad: Tensor | None = None,
) -> None:
    """Raise ValueError unless the arguments of `ops.linear_logprobs` fit each other."""
    _check_matrix("hidden", hidden, "T, H")
    _check_matrix("weight", weight, "Vl, H")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)} and hidden {tuple(hidden.shape)}; their last sizes must agree"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight has dtype {weight.dtype} and hidden {hidden.dtype}; they must be the same")
    _check_device("weight", weight, hidden.device)
    if weight_grad is not None:
        _check_shape("weight_grad", weight_grad, tuple(weight.shape), "Vl, H")
        _check_device("weight_grad", weight_grad, hidden.device)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if weight_grad.dtype not in (wide, weight.dtype):
            raise ValueError(f"weight_grad has dtype {weight_grad.dtype}; it must be {wide} or weight's {weight.dtype}")
    _check_shape("targets", targets, (hidden.shape[0],), "T")
    _check_device("targets", targets, hidden.device)
    _check_softmax(
        weight.shape[0],
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
    )


def _check_log_values(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has dtype {values.dtype}; it must be float32 or float64: half precision cannot resolve a clip "
            "of 3e-4, so keep log-probabilities in float32 from the logits on"
        )


def check_pack(first_name: str, first: Tensor, response_mask: Tensor, cu_seqlens: Tensor, num: int | None) -> None:
    """Raise ValueError unless tokens, mask and cu_seqlens describe one pack, and num_sequences can divide."""
    if first.dim() != 1:
        raise ValueError(f"{first_name} has shape {tuple(first.shape)}; it must be [T], the packed tokens")
    _check_shape("response_mask", response_mask, (first.shape[0],), "T")
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask has dtype {response_mask.dtype}; it must be bool")
    _check_device("response_mask", response_mask, first.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [S+1], from 0 to T")
    _check_integers("cu_seqlens", cu_seqlens)
    _check_device("cu_seqlens", cu_seqlens, first.device)
    if (cu_seqlens.numel() - 1 if num is None else num) < 1:
        raise ValueError(
            f"num_sequences={num} with {cu_seqlens.numel() - 1} local sequences: "
            "num_sequences must be at least 1, the number of sequences in the global batch"
        )


def check_policy_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    advantages: Tensor,
    num_sequences: int | None,
) -> None:
    """Raise ValueError unless log-probabilities, mask and advantages describe one pack."""
    check_pack("logprobs", logprobs, response_mask, cu_seqlens, num_sequences)
    tokens, sequences = logprobs.shape[0], cu_seqlens.numel() - 1
    _check_log_values("logprobs", logprobs)
    _check_log_values("old_logprobs", old_logprobs)
    _check_shape("old_logprobs", old_logprobs, (tokens,), "T")
    _check_device("old_logprobs", old_logprobs, logprobs.device)
    if advantages.dim() != 1 or (advantages.shape[0] != sequences and advantages.shape[0] != tokens):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; it must be [S] = ({sequences},) or [T] = ({tokens},)"
        )
    _check_device("advantages", advantages, logprobs.device)


def check_sequence_policy_loss(
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
    level: str,
    weights: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `ops.sequence_policy_loss` fit each other."""
    check_policy_tokens(logprobs, old_logprobs, response_mask, cu_seqlens, advantages, num_sequences)
    if weights is not None:
        _check_shape("weights", weights, (logprobs.shape[0],), "T")
        _check_device("weights", weights, logprobs.device)
    if level not in ("sequence", "token"):
        raise ValueError(f'level="{level}" must be "sequence" or "token"')
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low={clip_low} must lie between 0 and 1")
    if not clip_high > 0:
        raise ValueError(f"clip_high={clip_high} must be positive")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None to switch it off")


def check_sequence_mean(
    values: Tensor, response_mask: Tensor, cu_seqlens: Tensor, *, num_sequences: int | None
) -> None:
    """Raise ValueError unless the arguments of `ops.sequence_mean` fit each other."""
    check_pack("values", values, response_mask, cu_seqlens, num_sequences)
