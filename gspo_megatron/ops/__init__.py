"""Token log-probabilities and the sequence policy loss: the numerics that the clip depends on.

Letters in shapes: T packed tokens, S sequences, V vocabulary, Vl its local shard, H hidden size.
Every operation checks its arguments (ValueError) and, but for `skip_zero_rows`, never waits for the device.
implementation="native" runs the kernels of csrc/ and raises UserError where they were not built;
implementation="reference" runs their definition in plain torch, ops/reference.py.
"""

from __future__ import annotations

from types import MappingProxyType, ModuleType
from typing import Final, Literal

import torch.distributed as dist
from torch import Tensor

from gspo_megatron.ops import checks, native, reference
from gspo_megatron.ops.checks import check_policy_tokens
from gspo_megatron.ops.native.extension import check_device
from gspo_megatron.ops.reference import Level, PolicyLossStats

__all__ = [
    "Implementation",
    "PolicyLossStats",
    "check_device",
    "check_policy_tokens",
    "linear_logprobs",
    "sequence_mean",
    "sequence_policy_loss",
    "token_logprobs",
]

Implementation = Literal["native", "reference"]
_IMPLEMENTATIONS: Final = MappingProxyType[str, ModuleType]({"native": native, "reference": reference})


def _implementation(name: str) -> ModuleType:
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f'implementation="{name}" must be "native" or "reference"')
    return _IMPLEMENTATIONS[name]


def token_logprobs(
    logits: Tensor,  # [T, Vl]
    targets: Tensor,  # [T] int
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    implementation: Implementation = "native",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution softmax(logits / temperature).

    Statistics are float32, float64 for float64 logits. A logit of -inf is a token that cannot occur: its
    probability and gradient are 0. A token whose incoming gradients are both 0 gets gradient 0 whatever its
    logits hold, NaN included.

    Args:
        logits: columns vocab_start … vocab_start + Vl of the vocabulary.
        targets: vocabulary indices. One outside the vocabulary gives NaN: an error that shows unless it is masked.
        temperature: positive; divides the logits.
        vocab_start: vocabulary index of the first local column.
        vocab_size: columns from this vocabulary index on are padding, outside the softmax and without gradient.
            Default: no padding.
        group: tensor-parallel group over which the columns are split, equal shards in rank order. Two
            all-reduces in forward (maximum [T], sums [3, T]), none in backward.
        inplace_backward: backward writes the gradient over the logits. The caller must not read them again;
            a second backward raises.

    Returns:
        logprobs [T], never above 0, and entropy [T] in nats; both differentiable.
    """
    checks.check_token_logprobs(
        logits, targets, temperature=temperature, vocab_start=vocab_start, vocab_size=vocab_size, group=group
    )
    return _implementation(implementation).token_logprobs(
        logits,
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        inplace_backward=inplace_backward,
    )


def linear_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [Vl, H]
    targets: Tensor,  # [T] int
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad: Tensor | None = None,  # [Vl, H]
    skip_zero_rows: bool = False,
    implementation: Implementation = "native",
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden @ weight.T, without ever holding [T, Vl].

    The logits are accumulated and kept in float32 also for bfloat16 arguments: rounding them to bfloat16 alone
    moves a sequence's log ratio by as much as GSPO's clip.

    Args:
        hidden: the whole hidden states of all T tokens, on every rank of the group.
        weight: this rank's rows of the output layer, of hidden's dtype.
        reduce_hidden_grad: sum the gradient of hidden over the group in backward. False where the caller's own
            backward does so, as the gather of sequence parallelism does.
        weight_grad: backward adds the weight's gradient here, in this dtype, and gives the weight none. Megatron's
            float32 main_grad then takes it without a copy and without rounding.
        skip_zero_rows: backward leaves out the tokens whose incoming gradients are 0: masked ones, and those of
            clipped sequences. To know how many they are it waits for the device, once.

    The other arguments, and what is returned, are those of `token_logprobs`.
    """
    checks.check_linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        weight_grad=weight_grad,
    )
    return _implementation(implementation).linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        reduce_hidden_grad=reduce_hidden_grad,
        weight_grad=weight_grad,
        skip_zero_rows=skip_zero_rows,
    )


def sequence_policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    response_mask: Tensor,  # [T] bool
    cu_seqlens: Tensor,  # [S+1] int
    advantages: Tensor,  # [S] or [T]
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    num_sequences: int | None = None,
    level: Level = "sequence",
    weights: Tensor | None = None,  # [T]
    cp_group: dist.ProcessGroup | None = None,
    implementation: Implementation = "native",
) -> tuple[Tensor, PolicyLossStats]:
    """Clipped policy loss over packed sequences: GSPO and GSPO-token (arXiv 2507.18071), or GRPO.

    With T_i response tokens in sequence i, N sequences in the global batch, r_it = π/π_old of one token and
    log s_i the mean over the response of log r_it:

        loss = -(1/N) Σ_i (1/T_i) Σ_t ω_it · min(s_it A_it, clip(s_it, 1 - clip_low, 1 + clip_high) A_it)

    level="sequence": s_it has the value s_i and the gradient of s_i r_it / sg[r_it], sg meaning detached. With
    one advantage a response and no weights this is GSPO itself, value and gradient; with one a token it is
    GSPO-token, each token being clipped by the sign of its own advantage. level="token": s_it = r_it, GRPO.

    For A < 0 with dual_clip c the value is at most -c·A, without gradient beyond. A ratio exactly at a bound
    keeps its gradient. Sums are float64; the clip is decided on log s.

    Args:
        logprobs: differentiable; float32 or float64. Values under the mask are never read in arithmetic.
        cu_seqlens: where each sequence starts, and where the last ends; tokens behind it count as masked.
        advantages: where S equals T they are taken as [S].
        num_sequences: N, counted over all ranks and micro-batches, sequences without response tokens included.
            Default: S.
        weights: detached mismatch weights ω. They scale the numerator only: T_i and N stay.
        cp_group: context-parallel group. T and cu_seqlens are then this rank's share of the same S sequences;
            T_i and log s_i are summed over the group before the clip, and backward has no collective.

    Returns:
        loss [], this rank's share: its own tokens' terms. Over the context-parallel ranks, the micro-batches and
        the data-parallel ranks the shares add up to the loss of the batch (sum them, do not average), and so do
        their gradients. Of the dtype of logprobs.
        PolicyLossStats, detached; the same on every context-parallel rank but for clipped_tokens.
    """
    checks.check_sequence_policy_loss(
        logprobs,
        old_logprobs,
        response_mask,
        cu_seqlens,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        num_sequences=num_sequences,
        level=level,
        weights=weights,
    )
    return _implementation(implementation).sequence_policy_loss(
        logprobs,
        old_logprobs,
        response_mask,
        cu_seqlens,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        num_sequences=num_sequences,
        level=level,
        weights=weights,
        cp_group=cp_group,
    )


def sequence_mean(
    values: Tensor,  # [T]
    response_mask: Tensor,  # [T] bool
    cu_seqlens: Tensor,  # [S+1] int
    *,
    num_sequences: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
    implementation: Implementation = "native",
) -> Tensor:
    """(1/N) Σ_i (1/T_i) Σ_t values_it over response tokens: the mean that the KL and entropy terms use.

    Values under the mask are not read, and their gradient is 0. Arguments as in `sequence_policy_loss`; the
    result [] is this rank's share there too, to be summed over context-parallel ranks and micro-batches.
    """
    checks.check_sequence_mean(values, response_mask, cu_seqlens, num_sequences=num_sequences)
    return _implementation(implementation).sequence_mean(
        values, response_mask, cu_seqlens, num_sequences=num_sequences, cp_group=cp_group
    )
