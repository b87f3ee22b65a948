"""What the process with the device does in tests/gpu/test_training.py. Functions return plain data."""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gspo_megatron import sft
from gspo_megatron.config import MemoryConfig, ModelConfig, OptimizerConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.device import current_device
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy import attention, cpu_adaptation
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.runtime import initialize
from tests.distributed import cases
from tests.distributed.tiny_models import make_sequences


def adaptation() -> dict[str, Any]:
    """The device, and what of the CPU adaptation is in force: its patches of Megatron's modules and of torch."""
    cases.join({})
    megatron = {name: module for name, module in sys.modules.items() if name.startswith("megatron.core")}
    patched = [name for name, module in megatron.items() if getattr(module, "torch", torch) is not torch]
    methods = (torch.Tensor.type, torch.Tensor.cuda)
    patched += [str(method) for method in methods if not isinstance(method, types.MethodDescriptorType)]
    ours = [
        f"{name}.{attribute}"
        for name, module in megatron.items()
        for attribute, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == cpu_adaptation.__name__
    ]
    return {
        "device": current_device().type,
        "adapted": cpu_adaptation.adapt(),
        "patched": patched,
        "replaced functions": ours,
    }


def bytes_of_joining() -> int:
    """What the device's memory loses to joining a job of one rank, beyond CUDA's context. Not for a pool, whose cases
    share process groups."""
    device = current_device()
    torch.zeros(1, device=device)
    before = torch.cuda.mem_get_info(device)[0]
    with single_rank_environment():
        groups = initialize(ParallelLayout(), seed=0, timeout_s=60)
        torch.distributed.all_reduce(torch.zeros(1, device=device), group=groups.world)
    torch.cuda.synchronize(device)
    return before - torch.cuda.mem_get_info(device)[0]


def step_with_kernels(**arguments: Any) -> dict[str, Any]:
    """`cases.optimizer_step`, and how often it called the variable-length kernel and the grouped product."""
    calls = {"varlen": 0, "grouped": 0}
    varlen, grouped = attention._varlen_attn, F.grouped_mm

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    assert varlen is not None
    attention._varlen_attn, F.grouped_mm = counted("varlen", varlen), counted("grouped", grouped)  # type: ignore[assignment]
    try:
        return {"step": cases.optimizer_step(**arguments), "calls": calls}
    finally:
        attention._varlen_attn, F.grouped_mm = varlen, grouped  # type: ignore[assignment]


def _allocated() -> int:
    if current_device().type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def memory(folder: str, vocab: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A bfloat16 policy under the memory settings: bytes allocated on the device after a step and after the weights
    were handed over, where Adam's moments lie, and the gradient norms of two steps that hardly move the weights."""
    groups = cases.join({})
    gc.collect()  # of earlier cases
    before = _allocated()
    policy = MegatronPolicy(
        ModelConfig(path=folder, dtype="bfloat16"),
        OptimizerConfig(lr=1e-12),
        groups,
        seed=0,
        total_steps=10,
        memory=MemoryConfig(**settings),
    )
    [batch] = distribute(
        make_sequences(cases.STEP_LENGTHS, vocab, seed=11),
        groups,
        mini_batches=1,
        token_budget=160,
        pad_token_id=0,
        device=policy.device,
    )
    loss = sft.answer_loss(batch.num_global_sequences)
    norms = [policy.train_step(batch, loss).grad_norm]
    trained = _allocated()
    deque(policy.export(policy.weights.plan([[0]])), maxlen=0)  # keeps no bucket alive
    exported = _allocated()
    norms.append(policy.train_step(batch, loss).grad_norm)
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    states = [state for optimizer in optimizers for state in optimizer.optimizer.state.values()]
    return {
        "trained": trained - before,
        "exported": exported - before,
        "trained again": _allocated() - before,
        "parameters": sum(p.numel() for p in policy.weights.parameters),
        "moments": sorted({state[name].device.type for state in states for name in ("exp_avg", "exp_avg_sq")}),
        "grad_norms": norms,
    }
