"""What each rank does in the tests of conversion: Megatron's own saving and loading of the policy's model."""

from __future__ import annotations

import contextlib
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
from gspo_megatron.weights.torch_dist.description import HF_FOLDER, Description, write_description
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


def save(layout: dict[str, int], folder: str, out: str, dtype: str) -> None:
    """Load an HF folder and save it by Megatron."""
    policy = _policy(layout, folder, "weights")
    target = Path(out)
    if policy.groups.rank == 0:
        (target / HF_FOLDER).mkdir(parents=True)
        shutil.copy(Path(folder) / "config.json", target / HF_FOLDER)
        description = Description(policy.family.model_type, 3, dtype, ("model",), asdict(policy.groups.layout))
        write_description(target, description)
    dist.barrier()
    with _on_cpu():
        dist_checkpointing.save(_state(policy), str(target))


def load(layout: dict[str, int], folder: str, checkpoint: str) -> list[str]:
    """Names of tensors that differ between a strict load by Megatron and `policy.weights.load` of the HF folder."""
    policy = _policy(layout, folder, "weights")
    expected = {name: slot.tensor.clone() for name, slot in policy.weights.slots.items()}
    for slot in policy.weights.slots.values():
        slot.tensor.fill_(torch.nan)
    with _on_cpu():
        loaded = dist_checkpointing.load(_state(policy), checkpoint, strict=StrictHandling.RAISE_ALL)
    for i, chunk in enumerate(policy.chunks):
        prefix = f"chunk{i}."
        chunk.module.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)})
    assert policy.weights.slots
    return [name for name, slot in policy.weights.slots.items() if not torch.equal(slot.tensor, expected[name])]
