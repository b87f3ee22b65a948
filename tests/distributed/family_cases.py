"""What each rank does in the tests of model families."""

from __future__ import annotations

from typing import Any

import torch

from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.types import MicroBatch
from tests.distributed import cases
from tests.distributed.tiny_models import make_sequences

TOKEN_BUDGET = 64


def decayed(layout: dict[str, int], folder: str) -> list[str]:
    """Names of the parameters here that decay."""
    policy = cases.make_policy(cases.join(layout), folder, weight_decay=0.1, distributed=False)
    groups = policy.optimizer.param_groups
    moved = {id(p) for group in groups if group["wd_mult"] * policy.settings.weight_decay > 0 for p in group["params"]}
    return [name for name, slot in policy.weights.slots.items() if id(slot.parameter) in moved]


def token_weights(index: int, length: int) -> torch.Tensor:
    """[length] what each token's log-probability weighs in the loss of sequence `index`; the prompt's nothing."""
    generator = torch.Generator().manual_seed(300 + index)
    return torch.randn(length, generator=generator)


def parity(
    layout: dict[str, int], folder: str, lengths: list[int], vocab: int, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A training step of the policy on packed sequences: log-probabilities of the response tokens by sequence (from
    the last stage's ranks), the reduced gradients and the exported weights (at rank 0)."""
    groups = cases.join(layout)
    policy = MegatronPolicy(
        ModelConfig(path=folder, **settings.get("model", {})),
        OptimizerConfig(lr=1e-3, **settings.get("optimizer", {})),
        groups,
        seed=0,
        total_steps=10,
        memory=MemoryConfig(**settings.get("memory", {})),
    )
    [batch] = distribute(
        cases.scatter(groups, make_sequences(lengths, vocab, seed=3)),
        groups,
        mini_batches=1,
        token_budget=TOKEN_BUDGET,
        pad_token_id=0,
        device=policy.device,
    )
    weights = cases.whole_weights(policy)
    logprobs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def loss(values: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, None]:
        total = values.sum() * 0
        starts = micro.cu_seqlens.tolist()
        for i, index in enumerate(micro.sequence_ids.tolist()):
            at = slice(starts[i], starts[i + 1])
            mask = micro.response_mask[at]
            if index < 0:
                continue
            positions = micro.positions[at][mask]
            logprobs[index] = (positions.cpu(), values[at][mask].detach().cpu())
            total = total + values[at][mask] @ token_weights(index, lengths[index]).to(values.device)[positions]
        return total, None

    gradients: dict[str, torch.Tensor] = {}
    step = policy.optimizer.step

    def capture_then_step() -> Any:
        gradients.update(cases.whole_gradients(policy))
        return step()

    policy.optimizer.step = capture_then_step
    policy.train_step(batch, loss)
    after = {n: t for n, t in cases.whole_weights(policy).items() if n.endswith("e_score_correction_bias")}
    return {"logprobs": logprobs, "gradients": gradients, "weights": weights, "biases_after": after}
