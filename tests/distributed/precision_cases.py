"""What each rank does in the tests of bfloat16 models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron import ops
from gspo_megatron.config import ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.policy import model as model_module
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.types import StepBatch
from tests.distributed.cases import join, scatter
from tests.distributed.tiny_models import make_sequences

LENGTHS = [97, 12, 64, 33, 120, 25, 6, 80]


def _rounded_head(hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The head as a bfloat16 linear layer gives it: logits rounded to bfloat16 before the log-softmax."""
    for name in ("reduce_hidden_grad", "weight_grad", "skip_zero_rows"):
        arguments.pop(name)
    return ops.token_logprobs(hidden @ weight.t(), targets, **arguments)


def head_errors(layout: dict[str, int], folder: str, vocab: int, rounded: bool = False) -> dict[str, list[float]]:
    """log s between a bfloat16 model and a perturbed one, and its distance from the same with a float64 head.

    `rounded` keeps the head's product in bfloat16.
    """
    groups = join(layout)
    original = model_module.ops.linear_logprobs
    if rounded:
        model_module.ops.linear_logprobs = _rounded_head  # type: ignore[assignment]
    try:
        policy = MegatronPolicy(
            ModelConfig(path=folder, dtype="bfloat16"), OptimizerConfig(), groups, seed=0, total_steps=10
        )
        [batch] = distribute(
            scatter(groups, make_sequences(LENGTHS, vocab, seed=5)),
            groups,
            mini_batches=1,
            token_budget=256,
            pad_token_id=0,
            device=policy.device,
        )
        old, old_exact = _logprobs(policy, batch, vocab)
        with torch.no_grad():
            for name, slot in sorted(policy.weights.slots.items()):
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                noise = torch.randn(slot.tensor.shape, generator=generator).to(slot.tensor)
                slot.tensor.add_(0.02 * slot.tensor.abs().mean() * noise)
        new, new_exact = _logprobs(policy, batch, vocab)
    finally:
        model_module.ops.linear_logprobs = original
    ours, errors = [], []
    if groups.reports_loss:
        for m, micro in enumerate(batch.micro_batches):
            starts = micro.cu_seqlens.tolist()
            for i in range(len(starts) - 1):
                at = slice(starts[i], starts[i + 1])
                mask = micro.response_mask[at]
                if mask.any():
                    ours.append(float((new[m] - old[m])[at][mask].double().mean()))
                    exact = float((new_exact[m] - old_exact[m])[at][mask].mean())
                    errors.append(abs(ours[-1] - exact))
    return {"log_ratio": ours, "errors": errors}


def _logprobs(policy: MegatronPolicy, batch: StepBatch, vocab: int) -> tuple[list[Tensor], list[Tensor]]:
    """Per micro-batch the policy's log-probabilities, and float64 ones from the same hidden states and weights."""
    groups, captured, handle = policy.groups, [], None
    if groups.is_last_stage:
        head = policy.chunks[-1].module.output_layer
        handle = head.register_forward_pre_hook(lambda module, args: captured.append(args[0].detach()))
    policy.fill_old_logprobs([batch])
    if handle is None:
        return [], []
    handle.remove()
    weight = _gathered(head.weight.detach(), groups.tp)[:vocab].double()
    ours, exact = [], []
    for micro, hidden in zip(batch.micro_batches, captured, strict=True):
        assert micro.old_logprobs is not None and hidden.dtype == torch.bfloat16
        logits = _gathered(hidden, groups.tp).squeeze(1).double() @ weight.T
        ours.append(micro.old_logprobs)
        exact.append(logits.log_softmax(-1).gather(1, micro.targets[:, None]).squeeze(1))
    return ours, exact


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def optimizer_dtypes(layout: dict[str, int], folder: str) -> dict[str, set[torch.dtype]]:
    """Dtypes of a bfloat16 policy's parameters, of their gradients, and of what the optimizer updates."""
    groups = join(layout)
    policy = MegatronPolicy(
        ModelConfig(path=folder, dtype="bfloat16"), OptimizerConfig(), groups, seed=0, total_steps=10
    )
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return {
        "parameters": {p.dtype for p in policy.weights.parameters},
        "gradients": {p.main_grad.dtype for p in policy.weights.parameters},  # type: ignore[attr-defined]
        "main": {p.dtype for o in optimizers for group in o.param_groups for p in group["params"]},
    }
