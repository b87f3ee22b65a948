"""What each rank does in the tests of conversion: Megatron's own saving and loading of the policy's model."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import queue
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from gspo_megatron.config import ModelConfig, OptimizerConfig
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.weights.torch_dist.blocks import write_blocks, write_metadata
from gspo_megatron.weights.torch_dist.description import HF_FOLDER, Description, write_description
from gspo_megatron.weights.torch_dist.reader import FORMAT, FORMAT_CONTENT
from tests.distributed.cases import join


def _policy(layout: dict[str, int], folder: str, init: str) -> MegatronPolicy:
    return MegatronPolicy(ModelConfig(path=folder, init=init), OptimizerConfig(), join(layout), seed=7, total_steps=1)


def _state(policy: MegatronPolicy) -> dict[str, Any]:
    """Of all chunks of this rank, as the training's checkpoints hold it."""
    metadata = {"dp_cp_group": policy.groups.dp_cp}
    return {
        f"chunk{i}.{name}": value
        for i, chunk in enumerate(policy.chunks)
        for name, value in chunk.module.sharded_state_dict(metadata=metadata).items()
    }


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Megatron asks for a CUDA device while it saves, and starts processes, which those of the pool may not."""
    process, cuda = multiprocessing.current_process(), torch.cuda
    before = cuda.synchronize, cuda.current_device
    process._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._results_queue = queue.Queue()  # without a process that keeps it: nobody else asks for it
    cuda.synchronize, cuda.current_device = lambda *_: None, lambda: "cpu"  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        process._config["daemon"] = True  # type: ignore[attr-defined]
        cuda.synchronize, cuda.current_device = before
        filesystem_async._results_queue = None


def _describe(policy: MegatronPolicy, folder: str, target: Path, dtype: str) -> None:
    """At rank 0, what lies beside the tensors."""
    if policy.groups.rank == 0:
        (target / HF_FOLDER).mkdir(parents=True)
        shutil.copy(Path(folder) / "config.json", target / HF_FOLDER)
        description = Description(policy.family.model_type, 3, dtype, ("model",), asdict(policy.groups.layout))
        write_description(target, description)
    dist.barrier()


def save(layout: dict[str, int], folder: str, out: str, dtype: str) -> None:
    """Load an HF folder and save it by Megatron."""
    policy = _policy(layout, folder, "weights")
    _describe(policy, folder, Path(out), dtype)
    with _on_cpu():
        dist_checkpointing.save(_state(policy), out)


def save_training(layout: dict[str, int], folder: str, out: str, dtype: str) -> None:
    """Load an HF folder and save it as training saves its checkpoints, with the optimizer's state."""
    policy, target = _policy(layout, folder, "weights"), Path(out)
    _describe(policy, folder, target, dtype)
    snapshot = policy.snapshot()
    entries, _ = write_blocks(target / f"__{policy.groups.rank}_0.distcp", snapshot.blocks, snapshot.objects)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, entries)
    if policy.groups.rank == 0:
        write_metadata(target, [entry for part in parts for entry in part])
        (target / FORMAT).write_text(json.dumps(FORMAT_CONTENT))
    dist.barrier()


def load(layout: dict[str, int], folder: str, checkpoint: str) -> list[str]:
    """Names of tensors that differ from what `policy.weights.load` of the HF folder gives, after a strict load by
    Megatron and after one by the trainer's own reader."""
    policy = _policy(layout, folder, "weights")
    slots = policy.weights.slots
    assert slots
    expected = {name: slot.tensor.clone() for name, slot in slots.items()}

    def differing(reader: str) -> list[str]:
        found = [f"{reader}: {name}" for name, slot in slots.items() if not torch.equal(slot.tensor, expected[name])]
        for slot in slots.values():
            slot.tensor.fill_(torch.nan)
        return found

    assert not differing("none")
    with _on_cpu():
        loaded = dist_checkpointing.load(_state(policy), checkpoint, strict=StrictHandling.RAISE_ALL)
    for i, chunk in enumerate(policy.chunks):
        prefix = f"chunk{i}."
        chunk.module.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)})
    found = differing("Megatron's")
    policy.restore(Path(checkpoint), {"optimizer_steps": 0, "schedule_steps": 0}, weights_only=True)
    return found + differing("the trainer's")
