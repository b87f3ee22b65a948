"""Log-probs of the targets, and entropies, from logits that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron import ops
from gspo_megatron.ops import reference
from kernel_benchmark import definition
from kernel_benchmark.case import Candidate, Case, Objective, Prepared, Problem, Rates, Sizes, Tensors

ENTROPY, LOGPROBS = "log-probs and entropy", "log-probs"
NATIVE, EAGER = "gspo_megatron", "log_softmax, gather"
LOGITS_STD = 2.0


@dataclass(kw_only=True)
class TokenProblem(Problem):
    logits: Tensor  # [T, V], the leaf
    pristine: Tensor  # [T, V]
    targets: Tensor  # [T]

    def restore(self) -> None:
        with torch.no_grad():
            self.logits.copy_(self.pristine)


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> TokenProblem:
    num_tokens, num_columns = sizes
    generator = torch.Generator(device).manual_seed(0)
    pristine = torch.empty(num_tokens, num_columns, device=device, dtype=dtype)
    pristine.normal_(std=LOGITS_STD, generator=generator)
    targets = torch.randint(num_columns, (num_tokens,), generator=generator, device=device)
    upstream = torch.randn(2, num_tokens, generator=generator, device=device)
    num_bytes = pristine.numel() * pristine.element_size()

    def objective(grads: Tensors) -> Objective:
        return Objective(
            upstream=grads,
            errors=lambda outputs, gradients: _errors(pristine, targets, grads, outputs, gradients),
            # One read in forward; in backward one more, and the gradient written over it.
            floors=lambda rates: {"one pass each way": num_bytes / rates.read + 2 * num_bytes / _overwriting(rates)},
        )

    return TokenProblem(
        objectives={ENTROPY: objective((upstream[0], upstream[1])), LOGPROBS: objective((upstream[0],))},
        result_bytes=0,  # the gradient may lie in the logits' memory
        probe_bytes=num_bytes,
        logits=pristine.clone().requires_grad_(),
        pristine=pristine,
        targets=targets,
    )


def _overwriting(rates: Rates) -> float:
    return max(rates.update, rates.copy)


def _errors(
    pristine: Tensor, targets: Tensor, upstream: Tensors, outputs: Tensors, gradients: Tensors
) -> dict[str, float]:
    expected, difference, norm = [], 0.0, 0.0
    for rows in definition.blocks(*pristine.shape):
        logits = pristine[rows].double()
        expected.append(torch.stack(definition.logprobs_and_entropy(logits, targets[rows])))
        grad_entropy = upstream[1][rows] if len(upstream) == 2 else None
        gradient = definition.logits_gradient(logits, targets[rows], upstream[0][rows], grad_entropy)
        norm += gradient.square().sum().item()
        difference += (gradients[0][rows].double() - gradient).square().sum().item()
    logprobs, entropy = torch.cat(expected, dim=1)
    errors = {"output log-prob": definition.largest_difference(outputs[0], logprobs)}
    if len(outputs) == 2:
        errors["output entropy"] = definition.largest_difference(outputs[1], entropy)
    errors["gradient logits"] = (difference / norm) ** 0.5
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


def of_logits(function: Callable[[Tensor, Tensor], Tensors]) -> Callable[[TokenProblem], Prepared]:
    def prepare(problem: TokenProblem) -> Prepared:
        return Prepared(lambda: function(problem.logits, problem.targets), (problem.logits,))

    return prepare


def eager_with_entropy(logits: Tensor, targets: Tensor) -> Tensors:
    log_p = F.log_softmax(logits.float(), dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def eager(logits: Tensor, targets: Tensor) -> Tensors:
    return (F.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0],)


def selective_with_entropy(logits: Tensor, targets: Tensor) -> Tensors:
    logits = logits.float()
    log_sum = logits.logsumexp(dim=-1)
    probabilities = F.softmax(logits, dim=-1)
    return logits.gather(1, targets[:, None])[:, 0] - log_sum, log_sum - (probabilities * logits).sum(-1)


def selective(logits: Tensor, targets: Tensor) -> Tensors:
    logits = logits.float()
    return (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1),)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensors:
    return (-F.cross_entropy(logits.float(), targets, reduction="none"),)


def compiled(function: Callable[[Tensor, Tensor], Tensors]) -> Callable[[TokenProblem], Prepared]:
    return lambda problem: of_logits(torch.compile(function, fullgraph=True, dynamic=False))(problem)


def trl(*, entropy: bool) -> Callable[[TokenProblem], Prepared]:
    """On CUDA with Triton one fused kernel, else loops over rows in torch."""

    def prepare(problem: TokenProblem) -> Prepared:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

        if entropy:
            return of_logits(selective_log_softmax_and_entropy)(problem)
        return of_logits(lambda logits, targets: (selective_log_softmax(logits, targets),))(problem)

    return prepare


def megatron_fused(problem: TokenProblem) -> Prepared:
    """Its gradient is rounded to bfloat16, whatever the logits are."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if problem.logits.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def function(logits: Tensor, targets: Tensor) -> Tensors:
        return (-fused_vocab_parallel_cross_entropy(logits[:, None], targets[:, None], group)[:, 0],)

    return of_logits(function)(problem)


def liger_cross_entropy(problem: TokenProblem) -> Prepared:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return of_logits(lambda logits, targets: (-loss(logits, targets),))(problem)


def native(logits: Tensor, targets: Tensor) -> Tensors:
    return ops.token_logprobs(logits, targets, inplace_backward=True)


def definition_of_ops(logits: Tensor, targets: Tensor) -> Tensors:
    return reference.token_logprobs(logits, targets, inplace_backward=True)


CASE = Case(
    name="token_logprobs",
    title="Token log-probs from logits",
    letters="TxV",
    default_sizes={"cpu": (2048, 32768), "cuda": (8192, 151936)},
    small_sizes=(32, 512),
    dtypes={"cpu": "float32", "cuda": "bfloat16"},
    make=make,
    floor="the logits read once in forward, read and overwritten once in backward, at the measured bandwidths",
    candidates=(
        Candidate(NATIVE, ENTROPY, of_logits(native), ours=True),
        Candidate("gspo_megatron, reference", ENTROPY, of_logits(definition_of_ops), ours=True),
        Candidate(EAGER, ENTROPY, of_logits(eager_with_entropy)),
        Candidate("gather - logsumexp", ENTROPY, of_logits(selective_with_entropy)),
        Candidate("torch.compile of log_softmax, gather", ENTROPY, compiled(eager_with_entropy), compiled=True),
        Candidate("TRL selective_log_softmax_and_entropy", ENTROPY, trl(entropy=True)),
        Candidate(NATIVE, LOGPROBS, of_logits(lambda logits, targets: native(logits, targets)[:1]), ours=True),
        Candidate(
            "gspo_megatron, reference",
            LOGPROBS,
            of_logits(lambda logits, targets: definition_of_ops(logits, targets)[:1]),
            ours=True,
        ),
        Candidate(EAGER, LOGPROBS, of_logits(eager)),
        Candidate("gather - logsumexp", LOGPROBS, of_logits(selective)),
        Candidate("F.cross_entropy", LOGPROBS, of_logits(cross_entropy)),
        Candidate("torch.compile of log_softmax, gather", LOGPROBS, compiled(eager), compiled=True),
        Candidate("TRL selective_log_softmax", LOGPROBS, trl(entropy=False)),
        Candidate("Megatron fused_vocab_parallel_cross_entropy", LOGPROBS, megatron_fused, compiled=True),
        Candidate("Liger cross-entropy, Triton", LOGPROBS, liger_cross_entropy, only_on="cuda"),
    ),
)
