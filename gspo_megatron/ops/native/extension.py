"""The compiled extension: loading it, and naming to it a device, a tensor and a process group."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from gspo_megatron.errors import UserError
from gspo_megatron.ops.reference import all_reduce

# As in csrc/launchers.h.
DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_OTHERWISE = 'or choose the definition in plain torch with kernels.implementation="reference"'


@functools.cache
def load() -> ModuleType:
    """The extension.

    Raises:
        UserError: it was not built, or not for this Python.
    """
    try:
        from gspo_megatron import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            f'the native kernels can\'t be loaded: {error}. Build them with "make setup" or "pip install -e .", '
            f"{_OTHERWISE}"
        ) from error
    return _C


def check_device(device: torch.device) -> None:
    """Raise UserError unless the extension is there and has kernels for the device."""
    with_cuda = load().with_cuda
    if device.type == "cuda" and not with_cuda:
        raise UserError(
            'the native kernels were built without CUDA. Build them with "GSPO_CUDA=1 make setup" or '
            f'"GSPO_CUDA=1 pip install -e .", {_OTHERWISE}'
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"the native kernels run on cpu and cuda, not on {device.type}; use one of them, {_OTHERWISE}")


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The extension, and the place its operations run at: torch's threads, or its current stream of the device."""
    check_device(device)
    extension = load()
    if device.type == "cpu":
        yield extension, extension.Place(False, torch.get_num_threads(), 0)
    else:
        with torch.cuda.device(device):
            yield extension, extension.Place(True, 0, torch.cuda.current_stream().cuda_stream)


def address(values: Tensor | None) -> int:
    """Where the elements are, 0 for none. Contiguous, so that this is all an operation must know."""
    if values is None:
        return 0
    assert values.is_contiguous()
    return values.data_ptr()


def group_name(group: dist.ProcessGroup | None) -> str:
    """What stands for a group among an operator's arguments, which are tensors, numbers and strings."""
    return "" if group is None or group.size() == 1 else group.group_name


def all_reduce_by_name(values: Tensor, group: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the group of that name; with the name "" do nothing."""
    return all_reduce(values, op, _resolve_process_group(group) if group else None)  # type: ignore[arg-type]
