"""What each rank does in the tests of the memory estimate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gspo_megatron import sft
from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.policy.policy import MegatronPolicy
from tests.distributed.cases import join, scatter
from tests.distributed.tiny_models import make_sequences


def parameter_bytes(layout: dict[str, int], folder: str) -> int:
    """Bytes of one rank's parameters."""
    return sum(p.nbytes for chunk in _policy(layout, folder).chunks for p in chunk.parameters())


def _policy(layout: dict[str, int], folder: str) -> MegatronPolicy:
    return MegatronPolicy(
        ModelConfig(path=folder, init="random"), OptimizerConfig(), join(layout), seed=0, total_steps=1
    )


def held_bytes(
    layout: dict[str, int], folder: str, vocab: int, lengths: list[int], dtype: str, distributed: bool, recompute: str
) -> dict[str, int]:
    """Bytes of one rank after a step, and what autograd has kept when the forward pass of one micro-batch was done."""
    groups = join(layout)
    policy = MegatronPolicy(
        ModelConfig(path=folder, init="random", dtype=dtype),  # type: ignore[arg-type]
        OptimizerConfig(distributed=distributed),
        groups,
        seed=0,
        total_steps=1,
        memory=MemoryConfig(recompute=recompute),  # type: ignore[arg-type]
    )
    [batch] = distribute(
        scatter(groups, make_sequences(lengths, vocab, seed=3)),
        groups,
        mini_batches=1,
        token_budget=sum(lengths),
        pad_token_id=0,
        device=policy.device,
    )
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    is_forward = [True]
    loss = sft.answer_loss(batch.num_global_sequences)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if is_forward[0] and storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def last_of_forward(*arguments: Any) -> Any:
        is_forward[0] = False
        return loss(*arguments)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.train_step(batch, last_of_forward)
    return {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": _optimizer_bytes(policy, main=dtype == "bfloat16"),
        "activations": sum(kept.values()),
        "tokens": sum(micro.token_ids.numel() for micro in batch.micro_batches),
    }


def _optimizer_bytes(policy: MegatronPolicy, *, main: bool) -> int:
    """Moments, and the main parameters that they are of."""
    total = 0
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for parameter, state in part.optimizer.state.items():
            total += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
            total += parameter.nbytes if main else 0
    return total
