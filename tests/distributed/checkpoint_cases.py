"""What each rank does in the tests of checkpoints: train, save, load in another layout, train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron import sft
from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import UserError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.weights.torch_dist.blocks import write_blocks, write_metadata
from tests.distributed.cases import STEP_LENGTHS, join, scatter, whole_weights
from tests.distributed.tiny_models import make_sequences

COUNTS = "counts.json"


def _policy(groups: ProcessGroups, folder: str, settings: dict[str, Any]) -> MegatronPolicy:
    optimizer = {"lr": 1e-3, "warmup_steps": 3, "weight_decay": 0.1} | settings.get("optimizer", {})
    return MegatronPolicy(
        ModelConfig(path=folder, **settings.get("model", {})),
        OptimizerConfig(**optimizer),
        groups,
        seed=0,
        total_steps=10,
        memory=MemoryConfig(**settings.get("memory", {})),
    )


def _train(policy: MegatronPolicy, groups: ProcessGroups, vocab: int, steps: int) -> list[float]:
    norms = []
    for step in range(steps):
        [batch] = distribute(
            scatter(groups, make_sequences(STEP_LENGTHS, vocab, seed=step)),
            groups,
            mini_batches=1,
            token_budget=40,
            pad_token_id=0,
            device=policy.device,
        )
        norms.append(
            policy.train_step(batch, sft.answer_loss(batch.num_global_sequences, groups.sequence_group)).grad_norm
        )
    return norms


def write(policy: MegatronPolicy, groups: ProcessGroups, out: Path) -> None:
    """The tensors of a checkpoint, and the counts."""
    snapshot = policy.snapshot()
    if groups.rank == 0:
        out.mkdir(parents=True)
    dist.barrier(group=groups.world)
    entries, _ = write_blocks(out / f"__{groups.rank}_0.distcp", snapshot.blocks, snapshot.objects)
    every: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(every, entries, group=groups.world)
    if groups.rank == 0:
        write_metadata(out, [entry for part in every for entry in part])
        (out / COUNTS).write_text(json.dumps(snapshot.counts))
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (out / "metadata.json").write_text(
            json.dumps(backends | {"common_backend": "torch", "common_backend_version": 1})
        )
        torch.save({}, out / "common.pt")
    dist.barrier(group=groups.world)


def train_and_save(layout: dict[str, int], folder: str, vocab: int, out: str, **settings: Any) -> dict[str, Any]:
    """Two steps, saved; then a third that the checkpoint must not see. The weights and the third step's norm."""
    groups = join(layout)
    policy = _policy(groups, folder, settings)
    _train(policy, groups, vocab, 2)
    write(policy, groups, Path(out))
    weights = whole_weights(policy)
    norms = _train(policy, groups, vocab, 1)
    return {"weights": weights, "norms": norms, "after": whole_weights(policy)}


def load_and_save(
    layout: dict[str, int], folder: str, vocab: int, saved: str, out: str, weights_only: bool = False, **settings: Any
) -> dict[str, Any]:
    """Load into a fresh policy, save again what came of it, and make the third step."""
    groups = join(layout)
    policy = _policy(groups, folder, settings)
    counts = json.loads((Path(saved) / COUNTS).read_text())
    policy.restore(Path(saved), counts, weights_only=weights_only)
    write(policy, groups, Path(out))
    weights = whole_weights(policy)
    norms = _train(policy, groups, vocab, 1)
    return {"weights": weights, "norms": norms, "after": whole_weights(policy)}


def refusal(layout: dict[str, int], folder: str, saved: str, **settings: Any) -> str:
    """What is said of a checkpoint that does not fit."""
    policy = _policy(join(layout), folder, settings)
    try:
        policy.restore(Path(saved), json.loads((Path(saved) / COUNTS).read_text()))
    except UserError as error:
        return str(error)
    return ""


def load_with_megatron(layout: dict[str, int], folder: str, saved: str) -> dict[str, torch.Tensor]:
    """The weights as Megatron's own loader reads them, strictly."""
    from megatron.core import dist_checkpointing

    groups = join(layout)
    policy = _policy(groups, folder, {})
    with torch.no_grad():
        for parameter in policy.weights.parameters:
            parameter.zero_()
    for chunk in policy.chunks:
        state = chunk.module.sharded_state_dict(metadata={"singleton_local_shards": False})
        chunk.module.load_state_dict(dist_checkpointing.load(state, saved), strict=True)
    return whole_weights(policy)
