"""Who computes log-probs and GSPO's loss from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron import ops
from gspo_megatron.ops import reference
from kernel_benchmark.case import Candidate, Case, Prepared, Tensors
from kernel_benchmark.linear_logprobs import (
    CLIP_HIGH,
    CLIP_LOW,
    EAGER,
    ENTROPY,
    GSPO,
    LOGPROBS,
    NATIVE,
    SUM,
    LinearProblem,
    make,
)
from kernel_benchmark.token_logprobs import eager, eager_with_entropy

TRL_VOCABULARY_CHUNK = 32768  # what its trainers pass
LARGE_CHUNK = 256  # rows; torch's own choice is far fewer

OfLayer = Callable[[Tensor, Tensor, Tensor], Tensors]  # hidden, weight, targets


def of_layer(function: OfLayer) -> Callable[[LinearProblem], Prepared]:
    def prepare(problem: LinearProblem) -> Prepared:
        return Prepared(lambda: function(problem.hidden, problem.weight, problem.targets), problem.leaves)

    return prepare


def only_logprobs(function: OfLayer) -> OfLayer:
    return lambda hidden, weight, targets: function(hidden, weight, targets)[:1]


def summed(function: OfLayer) -> OfLayer:
    return lambda hidden, weight, targets: (function(hidden, weight, targets)[0].sum(),)


def eager_linear_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
    return eager_with_entropy(hidden @ weight.t(), targets)


def eager_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
    return eager(hidden @ weight.t(), targets)


def compiled(problem: LinearProblem) -> Prepared:
    return of_layer(torch.compile(eager_linear_with_entropy, fullgraph=True, dynamic=False))(problem)


def torch_cross_entropy(*, reduction: str, rows: int | None) -> Callable[[LinearProblem], Prepared]:
    """torch's own, in chunks of `rows`; None: of its own choice."""

    def prepare(problem: LinearProblem) -> Prepared:
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=rows, chunking_method="auto" if rows is None else None
        )

        def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
            return (-F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options),)

        return of_layer(function)(problem)

    return prepare


def trl(*outputs: str) -> Callable[[LinearProblem], Prepared]:
    def prepare(problem: LinearProblem) -> Prepared:
        from trl.kernels import ChunkedLogProbFunction

        def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
            results = ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, outputs
            )
            return tuple(results[: 1 + len(outputs)])

        return of_layer(function)(problem)

    return prepare


def verl(problem: LinearProblem) -> Prepared:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return of_layer(lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, 1.0, "none"))(problem)


def cut_cross_entropy(implementation: str) -> Callable[[LinearProblem], Prepared]:
    """'cce' leaves out small gradients, 'cce_exact' none."""

    def prepare(problem: LinearProblem) -> Prepared:
        from cut_cross_entropy import linear_cross_entropy

        def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
            return (-linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation),)

        return of_layer(function)(problem)

    return prepare


def liger_sum(problem: LinearProblem) -> Prepared:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return of_layer(lambda hidden, weight, targets: (-loss(weight, hidden, targets),))(problem)


# ---------------------------------------------------------------------------------------------------------------------
# To GSPO's loss
# ---------------------------------------------------------------------------------------------------------------------


def native_gspo(problem: LinearProblem) -> Prepared:
    mask = torch.ones_like(problem.targets, dtype=torch.bool)

    def forward() -> Tensors:
        logprobs, _ = ops.linear_logprobs(problem.hidden, problem.weight, problem.targets)
        loss, _ = ops.sequence_policy_loss(
            logprobs,
            problem.old_logprobs,
            mask,
            problem.cu_seqlens,
            problem.advantages,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
        )
        return (loss,)

    return Prepared(forward, problem.leaves)


def eager_gspo(problem: LinearProblem) -> Prepared:
    def forward() -> Tensors:
        (logprobs,) = eager_linear(problem.hidden, problem.weight, problem.targets)
        s = (logprobs - problem.old_logprobs).view(problem.by_sequence).mean(1).exp()
        a = problem.advantages
        return (-torch.minimum(s * a, s.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * a).mean(),)

    return Prepared(forward, problem.leaves)


def liger_gspo(problem: LinearProblem, *, sequences_per_chunk: int | None) -> Prepared:
    """In chunks of sequences; None: all in one. Its gradients are made in the forward pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    num_sequences, length = problem.by_sequence
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        chunk_size=sequences_per_chunk or num_sequences,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="grpo",
        importance_sampling_level="sequence",
    )
    mask = torch.ones(num_sequences, length, device=problem.hidden.device)
    old_logprobs = problem.old_logprobs.view(num_sequences, length)
    targets = problem.targets.view(num_sequences, length)

    def forward() -> Tensors:
        hidden = problem.hidden.view(num_sequences, length, -1)
        value, _ = loss(hidden, problem.weight, targets, mask, problem.advantages, old_per_token_logps=old_logprobs)
        return (value,)

    return Prepared(forward, problem.leaves)


CASE = Case(
    name="linear_logprobs",
    title="Log-probs from hidden states",
    letters="TxHxV",
    default_sizes={"cpu": (1024, 512, 32768), "cuda": (32768, 2048, 151936)},
    small_sizes=(32, 16, 512),
    dtypes={"cpu": "float32", "cuda": "bfloat16"},
    make=make,
    floor="three matrix products at the measured rate; who does not keep the logits needs a fourth",
    candidates=(
        Candidate(NATIVE, ENTROPY, of_layer(ops.linear_logprobs), ours=True),
        Candidate("gspo_megatron, reference", ENTROPY, of_layer(reference.linear_logprobs), ours=True),
        Candidate(EAGER, ENTROPY, of_layer(eager_linear_with_entropy)),
        Candidate("torch.compile of the same", ENTROPY, compiled, compiled=True, only_on="cuda"),
        Candidate("TRL ChunkedLogProbFunction", ENTROPY, trl("entropy")),
        Candidate("verl linear_cross_entropy, Triton", ENTROPY, verl, only_on="cuda"),
        Candidate(NATIVE, LOGPROBS, of_layer(only_logprobs(ops.linear_logprobs)), ours=True),
        Candidate(EAGER, LOGPROBS, of_layer(eager_linear)),
        Candidate("F.linear_cross_entropy", LOGPROBS, torch_cross_entropy(reduction="none", rows=None)),
        Candidate(
            f"F.linear_cross_entropy, {LARGE_CHUNK} rows",
            LOGPROBS,
            torch_cross_entropy(reduction="none", rows=LARGE_CHUNK),
        ),
        Candidate("TRL ChunkedLogProbFunction", LOGPROBS, trl()),
        Candidate("Cut Cross Entropy", LOGPROBS, cut_cross_entropy("cce"), only_on="cuda"),
        Candidate("Cut Cross Entropy, exact", LOGPROBS, cut_cross_entropy("cce_exact"), only_on="cuda"),
        Candidate(NATIVE, SUM, of_layer(summed(ops.linear_logprobs)), ours=True),
        Candidate("F.linear_cross_entropy", SUM, torch_cross_entropy(reduction="sum", rows=None)),
        Candidate(
            f"F.linear_cross_entropy, {LARGE_CHUNK} rows",
            SUM,
            torch_cross_entropy(reduction="sum", rows=LARGE_CHUNK),
        ),
        Candidate("Liger fused linear cross-entropy, Triton", SUM, liger_sum, only_on="cuda"),
        Candidate(NATIVE, GSPO, native_gspo, ours=True),
        Candidate(EAGER, GSPO, eager_gspo),
        Candidate(
            "Liger LigerFusedLinearGRPOLoss", GSPO, functools.partial(liger_gspo, sequences_per_chunk=1), compiled=True
        ),
        Candidate(
            "Liger LigerFusedLinearGRPOLoss, one chunk",
            GSPO,
            functools.partial(liger_gspo, sequences_per_chunk=None),
            compiled=True,
        ),
    ),
)
