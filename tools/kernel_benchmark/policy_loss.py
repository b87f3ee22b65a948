"""GSPO's loss and its gradient from packed log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron import ops
from gspo_megatron.ops import reference
from kernel_benchmark import definition
from kernel_benchmark.case import Candidate, Case, Objective, Prepared, Problem, Sizes, Tensors

LOSS = "loss"
NATIVE = "gspo_megatron"
BY_INDEX, BY_SEQUENCE = "segment_reduce and a segment index", "segment_reduce, a loss a sequence"
CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4
# A token: log-probs, old ones and the mask are read; gradient and clip flags written; backward scales the gradient.
TOUCHED_BYTES = 4 + 4 + 1 + 4 + 1 + 8


@dataclass(kw_only=True)
class PolicyProblem(Problem):
    logprobs: Tensor  # [T] float32, the leaf
    old_logprobs: Tensor  # [T] float32
    response_mask: Tensor  # [T] bool
    lengths: Tensor  # [S] int64
    cu_seqlens: Tensor  # [S+1] int64
    advantages: Tensor  # [S] float32


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> PolicyProblem:
    num_sequences, num_tokens = sizes
    generator = torch.Generator().manual_seed(0)  # the same lengths on every device
    # Lengths from half to one and a half of the mean.
    weights = torch.rand(num_sequences, generator=generator) + 0.5
    ends = (weights.cumsum(0) / weights.sum() * num_tokens).round().long()
    ends[-1] = num_tokens
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    lengths = cu_seqlens.diff()
    position = torch.arange(num_tokens) - cu_seqlens[:-1].repeat_interleave(lengths)
    response_mask = position >= (lengths // 4).repeat_interleave(lengths)  # the first quarter is the prompt
    logprobs = -torch.rand(num_tokens, generator=generator) * 4
    # log s is ±1e-4 or ±6e-4 give or take a tenth: on both sides of the clip, far enough from it for float32.
    size = torch.tensor([1e-4, -1e-4, 6e-4, -6e-4]).repeat(num_sequences // 4 + 1)[:num_sequences]
    log_s = size * (0.9 + 0.2 * torch.rand(num_sequences, generator=generator))
    noise = 0.01 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    means = torch.stack([n[m].mean() for n, m in _by_sequence(lengths, noise, response_mask)])
    old_logprobs = (logprobs - noise + (means - log_s).repeat_interleave(lengths)).float()
    advantages = torch.randn(num_sequences, generator=generator)

    def errors(outputs: Tensors, gradients: Tensors) -> dict[str, float]:
        exact = logprobs.double().requires_grad_()
        loss = definition.gspo_loss(
            exact, old_logprobs, response_mask, lengths.tolist(), advantages, CLIP_LOW, CLIP_HIGH
        )
        (expected,) = torch.autograd.grad(loss, exact)
        return {
            "output loss": definition.largest_difference(outputs[0].cpu(), loss.detach()),
            "gradient log-probs": definition.relative_difference(gradients[0].cpu(), expected),
        }

    one = torch.ones((), device=device)
    objective = Objective(
        (one,),
        errors,
        lambda rates: {"one pass each way": TOUCHED_BYTES * num_tokens / max(rates.copy, rates.update)},
    )
    return PolicyProblem(
        objectives={LOSS: objective},
        result_bytes=4 * num_tokens,
        probe_bytes=4 * num_tokens,
        logprobs=logprobs.to(device).requires_grad_(),
        old_logprobs=old_logprobs.to(device),
        response_mask=response_mask.to(device),
        lengths=lengths.to(device),
        cu_seqlens=cu_seqlens.to(device),
        advantages=advantages.to(device),
    )


def _by_sequence(lengths: Tensor, *values: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(v.split(lengths.tolist()) for v in values), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


def native(problem: PolicyProblem) -> Prepared:
    return _ours(problem, ops.sequence_policy_loss)


def definition_of_ops(problem: PolicyProblem) -> Prepared:
    return _ours(problem, reference.sequence_policy_loss)


def _ours(problem: PolicyProblem, operation: Callable[..., tuple[Tensor, ops.PolicyLossStats]]) -> Prepared:
    def forward() -> Tensors:
        loss, _ = operation(
            problem.logprobs,
            problem.old_logprobs,
            problem.response_mask,
            problem.cu_seqlens,
            problem.advantages,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
        )
        return (loss,)

    return Prepared(forward, (problem.logprobs,))


def surrogate(s: Tensor, advantages: Tensor) -> Tensor:
    return torch.minimum(s * advantages, s.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)


def by_index(problem: PolicyProblem) -> Prepared:
    """A loss a token, as packed trainers have it: the ratio is spread over the tokens by the index."""
    p = problem
    segments = torch.arange(len(p.lengths), device=p.lengths.device).repeat_interleave(p.lengths)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        sums = torch.segment_reduce(values * mask, "sum", lengths=p.lengths)
        return sums / torch.segment_reduce(mask, "sum", lengths=p.lengths).clamp(min=1)

    def forward() -> Tensors:
        mask = p.response_mask.float()
        s = mean(p.logprobs - p.old_logprobs, mask).exp().index_select(0, segments)
        return (-mean(surrogate(s, p.advantages.index_select(0, segments)), mask).mean(),)

    return Prepared(forward, (p.logprobs,))


def by_sequence(problem: PolicyProblem) -> Prepared:
    """A loss a sequence: nothing is spread over tokens, but there are no advantages or clip flags of tokens."""
    p = problem

    def forward() -> Tensors:
        mask = p.response_mask.float()
        sums = torch.segment_reduce((p.logprobs - p.old_logprobs) * mask, "sum", lengths=p.lengths)
        s = (sums / torch.segment_reduce(mask, "sum", lengths=p.lengths).clamp(min=1)).exp()
        return (-surrogate(s, p.advantages).mean(),)

    return Prepared(forward, (p.logprobs,))


def by_index_add(problem: PolicyProblem) -> Prepared:
    """A loss a sequence, sums by index_add."""
    p = problem
    segments = torch.arange(len(p.lengths), device=p.lengths.device).repeat_interleave(p.lengths)

    def forward() -> Tensors:
        mask = p.response_mask.float()
        zeros = torch.zeros_like(p.advantages)
        sums = zeros.index_add(0, segments, (p.logprobs - p.old_logprobs) * mask)
        s = (sums / zeros.index_add(0, segments, mask).clamp(min=1)).exp()
        return (-surrogate(s, p.advantages).mean(),)

    return Prepared(forward, (p.logprobs,))


def padded(problem: PolicyProblem) -> Prepared:
    """[S, L], everything padded to the longest beforehand."""
    p = problem
    longest = int(p.lengths.max())
    position = torch.arange(longest, device=p.lengths.device)
    there = position < p.lengths[:, None]

    def pad(values: Tensor) -> Tensor:
        result = values.new_zeros(len(p.lengths), longest)
        result[there] = values
        return result

    logprobs = pad(p.logprobs.detach()).requires_grad_()
    old_logprobs, response_mask = pad(p.old_logprobs), pad(p.response_mask)

    def forward() -> Tensors:
        mask = response_mask.float()
        num_tokens = mask.sum(-1).clamp(min=1)
        s = (((logprobs - old_logprobs) * mask).sum(-1) / num_tokens).exp()
        losses = surrogate(s, p.advantages)[:, None].expand_as(mask)
        return (-((losses * mask).sum(-1) / num_tokens).mean(),)

    return Prepared(forward, (logprobs,), lambda gradients: (gradients[0][there],))


CASE = Case(
    name="policy_loss",
    title="Sequence policy loss",
    letters="SxT",
    default_sizes={"cpu": (512, 262144), "cuda": (512, 262144)},
    small_sizes=(8, 256),
    dtypes={"cpu": "float32", "cuda": "float32"},
    has_dtype=False,
    make=make,
    floor=f"{TOUCHED_BYTES} bytes a token at the bandwidth measured with arrays of as many tokens",
    candidates=(
        Candidate(NATIVE, LOSS, native, ours=True),
        Candidate("gspo_megatron, reference", LOSS, definition_of_ops, ours=True),
        Candidate(BY_INDEX, LOSS, by_index),
        Candidate(BY_SEQUENCE, LOSS, by_sequence),
        Candidate("index_add, a loss a sequence", LOSS, by_index_add),
        Candidate("padded [S, L]", LOSS, padded),
    ),
)
