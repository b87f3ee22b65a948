"""Counts what every collective sends, by what it is for.

Every call of torch.distributed, from whatever alias and in backward too, becomes an operator of the c10d namespace,
which a dispatch mode sees. `written_bytes` is an independent count, the kernel's own.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "other"  # norms and losses: not in the formula


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_nbytes, tensors))


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _leaving(call: dict[str, Any], ranks: int, rank: int) -> float:
    """Bytes of an all-to-all's input that go to other ranks."""
    splits, rows = call["input_split_sizes"], call["input"].shape[0]
    staying = splits[rank] / max(rows, 1) if splits else 1 / ranks
    return _nbytes(call["input"]) * (1 - staying)


# What a rank sends under the ideal ring or pairwise algorithm: (arguments by name, ranks, rank) -> bytes.
SENT: dict[str, Callable[[dict[str, Any], int, int], float]] = {
    "allreduce_": lambda call, ranks, _: 2 * _ring(ranks) * _nbytes(call["tensors"]),
    "allreduce_coalesced_": lambda call, ranks, _: 2 * _ring(ranks) * _nbytes(call["tensors"]),
    "_allgather_base_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["output_tensor"]),
    "allgather_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["output_tensors"]),
    "allgather_into_tensor_coalesced_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["outputs"]),
    "_reduce_scatter_base_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["input_tensor"]),
    "reduce_scatter_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["input_tensors"]),
    "reduce_scatter_tensor_coalesced_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["inputs"]),
    "alltoall_base_": _leaving,
    "broadcast_": lambda call, ranks, _: _ring(ranks) * _nbytes(call["tensors"]),
    "send": lambda call, ranks, _: _nbytes(call["tensors"]),
    "recv_": lambda call, ranks, _: 0,
    "barrier": lambda call, ranks, _: 0,
}


def _callers() -> set[str]:
    """Files of the functions that are running, such as megatron/core/tensor_parallel/mappings."""
    frame: FrameType | None = sys._getframe(2)
    names = set()
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("megatron/core/", "gspo_megatron/"):
            if package in path:
                names.add(package + path.rpartition(package)[2].removesuffix(".py"))
        frame = frame.f_back
    return names


def kind_of(operator: str, role: str, callers: set[str]) -> str:
    """The field of `gspo_megatron.traffic.Traffic` that a collective belongs to, or OTHER.

    Args:
        role: what its process group is for, see `group_roles`.
        callers: files of the running functions; in backward they are few, and the group alone decides.
    """
    if "megatron/core/distributed/param_and_grad_buffer" in callers:
        what = "parameters" if "gather" in operator else "gradients"
        return f"expert_{what}" if role == "edp" else what
    if "megatron/core/distributed/finalize_model_grads" in callers:
        return "replicated"
    if any(caller.startswith("megatron/core/optimizer/") for caller in callers):
        return OTHER
    if "megatron/core/pipeline_parallel/p2p_communication" in callers:
        return "pipeline"
    if any(caller.startswith("gspo_megatron/ops/") for caller in callers):
        return "vocabulary" if role == "tp" else OTHER
    kinds = {"tp": "sequence", "cp": "context", "ep": "experts", "etp": "expert_tensor", "tp_ep": "routing"}
    return kinds.get(role, OTHER)


class CollectiveCounter(TorchDispatchMode):
    """Counts what the collectives inside it send, in forward and in backward (on the CPU they share a thread).

    An operator that is not in SENT raises KeyError: nothing passes uncounted.
    """

    def __init__(self, roles: dict[str, str]) -> None:
        super().__init__()
        self.roles = roles  # name of a process group -> what it is for
        self.sent: Counter[str] = Counter()  # bytes by kind
        self.gloo_bytes = 0.0  # what gloo sends for these calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            call = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            group = dist.ProcessGroup.unbox(call["process_group"])
            operator = func._schema.name.partition("::")[2]
            size = SENT[operator](call, group.size(), group.rank())
            self.sent[kind_of(operator, self.roles.get(group.group_name, ""), _callers())] += size  # type: ignore[assignment]
            # gloo's reduce-scatter is an all-reduce of which each rank keeps its piece.
            self.gloo_bytes += 2 * size if "reduce_scatter" in operator else size
        return func(*args, **(kwargs or {}))


def group_roles() -> dict[str, str]:
    """Names of Megatron's process groups and what each is for."""
    from megatron.core import parallel_state as state

    groups = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "etp": state.get_expert_tensor_parallel_group(),
        "edp": state.get_expert_data_parallel_group(),
        "tp_ep": state.get_expert_tensor_and_model_parallel_group(),
    }
    roles = {group.group_name: role for role, group in groups.items()}
    assert len(roles) == len(groups), "two kinds of traffic share a process group"
    return roles


def written_bytes() -> int:
    """What this process has written so far, to sockets above all, by the kernel's own count."""
    found = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])
