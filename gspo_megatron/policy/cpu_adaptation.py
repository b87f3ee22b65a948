"""Megatron-Core 0.16.1 assumes CUDA in a few places; this module makes those places work on the CPU.

Where CUDA is there `adapt()` leaves all of that alone. Each patch is named after what it replaces. Only Megatron's
own modules see the changes: torch itself is touched in two methods, whose answers change for Megatron's
callers alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.policy import permutation

CPU = torch.device("cpu")
FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")


class _HostStream:
    """Stands for a CUDA stream or event: on the host everything is already done."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, *args: object) -> None:
        pass

    wait = wait_event = record = synchronize = wait_stream

    def record_event(self, *args: object) -> _HostStream:
        return self

    def query(self) -> bool:
        return True


class _Namespace(ModuleType):
    """A module that answers like `base`, but for the given replacements."""

    def __init__(self, base: ModuleType, replacements: dict[str, Any]) -> None:
        super().__init__(base.__name__)
        self.__dict__["_base"] = base
        self.__dict__.update(replacements)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_base"], name)
        self.__dict__[name] = value
        return value


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The factory, with device="cuda" read as the CPU and without pinning."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _host_torch() -> ModuleType:
    """`torch` as Megatron's modules shall see it."""
    random = _Namespace(torch.cuda.random, {"get_rng_state": lambda *a, **k: torch.get_rng_state()})
    cuda = _Namespace(
        torch.cuda,
        {
            "current_device": lambda: CPU,
            "Stream": _HostStream,
            "Event": _HostStream,
            "current_stream": lambda *a, **k: _HostStream(),
            "default_stream": lambda *a, **k: _HostStream(),
            "stream": lambda *a, **k: contextlib.nullcontext(),
            "synchronize": lambda *a, **k: None,
            "empty_cache": lambda: None,
            "manual_seed": torch.manual_seed,
            "get_rng_state": lambda *a, **k: torch.get_rng_state(),
            "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
            "random": random,
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
    return _Namespace(torch, {"cuda": cuda, **factories})


def torch_in_megatron() -> None:
    """`torch.cuda.*` and factories with device="cuda" in Megatron's modules."""
    host = _host_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = host  # type: ignore[attr-defined]


def cuda_rng_state() -> None:
    """megatron.core.tensor_parallel.random: RNG state of the device."""
    from megatron.core.tensor_parallel import random

    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def tensor_type_in_optimizer() -> None:
    """megatron.core.optimizer sorts parameters by `param.type()` == "torch.cuda.FloatTensor"."""
    original = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]


def tensor_cuda() -> None:
    """`tensor.cuda()` in Megatron's modules, e.g. for a tied embedding on the last pipeline stage."""
    original = torch.Tensor.cuda

    def cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return self if caller.startswith("megatron.core") else original(self, *args, **kwargs)

    torch.Tensor.cuda = cuda  # type: ignore[assignment,method-assign]


def te_general_gemm() -> None:
    """megatron.core.transformer.moe.moe_utils uses the name without Transformer Engine, unset."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def token_permutation() -> None:
    """token_dispatcher.permute and unpermute add in an order, and in a dtype, that log s can't bear, and
    sort_chunks_by_idxs copies what is in order: permutation.py."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.permute, token_dispatcher.unpermute = permutation.permute, permutation.unpermute
    token_dispatcher.sort_chunks_by_idxs = permutation.sort_chunks


def te_version() -> None:
    """megatron.core.optimizer.optimizer_config compares the version of Transformer Engine with none installed."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.utils import get_te_version

    if get_te_version() is None:
        optimizer_config.is_te_min_version = lambda version, check_equality=True: False


def latent_attention() -> None:
    """multi_latent_attention takes Transformer Engine for installed whenever Megatron's module for it can be imported,
    and then a stand-in for its class of linear layers."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def split_sizes() -> None:
    """token_dispatcher.maybe_move_tensor_to_cpu leaves host tensors where all-to-all needs numbers."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move


def uneven_collectives() -> None:
    """tensor_parallel.mappings: gloo gathers and reduce-scatters equal pieces only."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        padded = x.new_zeros((max(output_split_sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        pieces = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([p[:n] for p, n in zip(pieces, output_split_sizes, strict=True)])

    def scatter(x: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


@dataclass(frozen=True)
class Patch:
    """A patch and the symbols it relies on, as "module:attribute"; a test checks that they exist."""

    apply: Callable[[], None]
    symbols: tuple[str, ...]
    on_cuda_too: bool = False  # mends what is wrong on any device, without Transformer Engine


PATCHES = (
    Patch(
        torch_in_megatron,
        tuple(
            f"megatron.core.{name}:torch"
            for name in (
                "optimizer.clip_grads",
                "optimizer.optimizer",
                "optimizer.distrib_optimizer",
                "pipeline_parallel.schedules",
                "pipeline_parallel.p2p_communication",
                "distributed.param_and_grad_buffer",
                "tensor_parallel.mappings",
                "tensor_parallel.layers",
                "tensor_parallel.random",
            )
        ),
    ),
    Patch(
        cuda_rng_state,
        (
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        ),
    ),
    Patch(tensor_type_in_optimizer, ("torch:Tensor.type",)),
    Patch(tensor_cuda, ("torch:Tensor.cuda",)),
    Patch(te_general_gemm, ("megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction",), True),
    Patch(
        token_permutation,
        (
            "megatron.core.transformer.moe.token_dispatcher:permute",
            "megatron.core.transformer.moe.token_dispatcher:unpermute",
            "megatron.core.transformer.moe.token_dispatcher:sort_chunks_by_idxs",
        ),
        True,
    ),
    Patch(
        te_version,
        (
            "megatron.core.optimizer.optimizer_config:is_te_min_version",
            "megatron.core.utils:get_te_version",
        ),
        True,
    ),
    Patch(
        latent_attention,
        (
            "megatron.core.extensions.transformer_engine:HAVE_TE",
            "megatron.core.transformer.multi_latent_attention:HAVE_TE",
        ),
        True,
    ),
    Patch(split_sizes, ("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",)),
    Patch(
        uneven_collectives,
        (
            "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
            "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        ),
    ),
)

_adapted = False


def adapt() -> bool:
    """Apply the patches that this machine needs, once. Returns whether the CPU path is in use.

    Call after importing the Megatron modules that will be used: patches reach loaded modules only.
    """
    global _adapted
    on_cpu = not torch.cuda.is_available()
    if not _adapted:
        for patch in PATCHES:
            if on_cpu or patch.on_cuda_too:
                patch.apply()
        _adapted = True
    return on_cpu
