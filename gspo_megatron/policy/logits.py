"""Logits of a torch_dist checkpoint on one rank, to compare them with another implementation's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.config import ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.checkpoint import blocks_to_load
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.runtime import initialize, shutdown
from gspo_megatron.policy.step import forward_only
from gspo_megatron.types import Sequence
from gspo_megatron.weights.torch_dist.blocks import read_blocks
from gspo_megatron.weights.torch_dist.description import HF_FOLDER

_TIMEOUT_S = 60.0


def megatron_logits(checkpoint: Path, token_ids: Tensor) -> Tensor:
    """[B, L, vocabulary] in float32 of token_ids [B, L], through the training's own model and forward pass.

    Call it in the environment of a job's only rank (launch.single_rank_environment).
    """
    groups = initialize(ParallelLayout(), seed=0, timeout_s=_TIMEOUT_S)
    try:
        model = ModelConfig(path=str(checkpoint / HF_FOLDER), init="random", dtype="float32")
        policy = MegatronPolicy(model, OptimizerConfig(), groups, seed=0, total_steps=1)
        # The stored dtype widened; without the optimizer, no more is read than the model.
        blocks = blocks_to_load(policy.chunks, policy.optimizer, weights_only=True)
        read_blocks(checkpoint, blocks, converts=True)
        return _logits(policy, token_ids)
    finally:
        shutdown()


@torch.no_grad()
def _logits(policy: MegatronPolicy, token_ids: Tensor) -> Tensor:
    count, length = token_ids.shape
    nothing = torch.zeros(length)
    sequences = [Sequence(i, row, nothing.bool(), nothing, nothing[0]) for i, row in enumerate(token_ids)]
    [batch] = distribute(
        sequences, policy.groups, mini_batches=1, token_budget=length, pad_token_id=0, device=policy.device
    )
    hidden: list[Tensor] = []
    last = policy.chunks[-1].module
    hook = last.output_layer.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().squeeze(1)))
    forward_only(policy.chunks, batch.micro_batches, policy.groups)
    hook.remove()
    tied = last.share_embeddings_and_output_weights
    weight = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
    logits = torch.empty(count, length, policy.fields.vocab_size)
    for micro, states in zip(batch.micro_batches, hidden, strict=True):
        starts = micro.cu_seqlens.tolist()
        for i, index in enumerate(micro.sequence_ids.tolist()):
            if index >= 0:
                own = states[starts[i] : starts[i] + length]
                logits[index] = (own @ weight.T)[:, : policy.fields.vocab_size].cpu()
    return logits
