"""What recomputation saves and costs, and what grouped experts gain, measured on one rank of this device.

A random Qwen3-MoE takes training steps on a packed micro-batch, each setting in turn. Printed are the bytes that
autograd keeps between forward and backward (unique storages, parameters left out), the step's seconds beside those of
the defaults, and the bytes of gradients and optimizer state that one rank holds.

    python tools/benchmark_settings.py [--tokens 4096] [--steps 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_moe import MODEL, ragged_sequences
from torch import Tensor

from gspo_megatron import sft
from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.micro_batch import pack
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.runtime import initialize
from gspo_megatron.types import StepBatch

DEFAULTS = "defaults"
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the sections model and memory
    DEFAULTS: ({}, {}),
    'memory.recompute = "selective"': ({}, {"recompute": "selective"}),
    'memory.recompute = "moe"': ({}, {"recompute": "moe"}),
    'memory.recompute = "full"': ({}, {"recompute": "full"}),
    'model.experts = "sequential"': ({"experts": "sequential"}, {}),
}
LONGEST = 1024


@dataclass
class Kept:
    """Bytes of what autograd keeps for the backward pass."""

    parameters: set[int]  # storages that exist anyway
    storages: dict[int, int]
    is_forward: bool = True

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self.is_forward and storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def make_batch(tokens: int) -> StepBatch:
    """One packed micro-batch of ragged sequences, `tokens` in all."""
    sequences = ragged_sequences(tokens, longest=LONGEST, generator=torch.Generator().manual_seed(0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    micro = pack(sequences, pad_token_id=0, device=device)
    return StepBatch([micro], num_global_sequences=len(sequences), num_global_tokens=micro.response_tokens.numel())


def measure(policies: dict[str, MegatronPolicy], batch: StepBatch, steps: int) -> dict[str, tuple[int, float]]:
    """(bytes kept, median seconds a step) of each policy; the steps of all policies take turns."""
    loss = sft.answer_loss(batch.num_global_sequences)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    kept: dict[str, int] = {}
    for step in range(steps + 1):
        for name, policy in policies.items():
            storages = {p.untyped_storage().data_ptr() for p in policy.weights.parameters}
            counter = Kept(storages, {})
            start = time.perf_counter()
            if step == 0:  # also warms up

                def last_of_forward(*arguments: Any, counter: Kept = counter) -> Any:
                    result = loss(*arguments)
                    counter.is_forward = False  # what is kept from here on is recomputed, a layer at a time
                    return result

                with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
                    policy.train_step(batch, last_of_forward)
                kept[name] = sum(counter.storages.values())
                continue
            policy.train_step(batch, loss)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: (kept[name], statistics.median(seconds[name])) for name in policies}


def table(results: dict[str, tuple[int, float]], policy: MegatronPolicy, tokens: int) -> str:
    """The report, in Markdown."""
    parameters = sum(p.numel() for p in policy.weights.parameters)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    base_kept, base_seconds = results[DEFAULTS]
    lines = [
        f"One rank, {parameters / 1e6:.1f} M parameters, float32, one packed micro-batch of {tokens} tokens in "
        f"sequences of {LONGEST // 4} to {LONGEST}; {device}.",
        "",
        "| setting | kept for the backward pass, KiB a token | of the defaults' | step time / the defaults' |",
        "|---|---|---|---|",
    ]
    for name, (kept, seconds) in results.items():
        lines.append(f"| {name} | {kept / tokens / 1024:.1f} | {kept / base_kept:.0%} | {seconds / base_seconds:.2f} |")
    state = _optimizer_bytes(policy)
    gradients = sum(buffer.grad_data.nbytes for chunk in policy.chunks for buffer in _buffers(chunk))
    lines += [
        "",
        "| held by the rank | bytes a parameter | freed by |",
        "|---|---|---|",
        f"| gradients, float32 | {gradients / parameters:.1f} | memory.offload_gradients, between training phases |",
        f"| Adam's moments, float32 | {state / parameters:.1f} | memory.offload_optimizer (bfloat16 models on a GPU, "
        "with 4 more of main parameters); optimizer.distributed shares them out over data-parallel ranks |",
    ]
    return "\n".join(lines) + "\n"


def _buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _optimizer_bytes(policy: MegatronPolicy) -> int:
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def main(arguments: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="in the micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each setting")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    with single_rank_environment(), tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        groups = initialize(ParallelLayout(), seed=0, timeout_s=600)
        policies = {
            name: MegatronPolicy(
                ModelConfig(path=folder, init="random", **model),
                OptimizerConfig(lr=1e-5),
                groups,
                seed=0,
                total_steps=100,
                memory=MemoryConfig(**memory),
            )
            for name, (model, memory) in SETTINGS.items()
        }
        report = table(measure(policies, make_batch(options.tokens), options.steps), policies[DEFAULTS], options.tokens)
        dist.destroy_process_group()
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report)


if __name__ == "__main__":
    main()
