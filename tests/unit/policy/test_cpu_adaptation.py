"""The CPU adaptation: what it replaces exists, Megatron sees the host, everyone else sees torch as it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo_megatron.policy import cpu_adaptation
from gspo_megatron.policy.cpu_adaptation import FACTORIES, PATCHES, Patch, adapt

SYMBOLS = [(patch.apply.__name__, symbol) for patch in PATCHES for symbol in patch.symbols]
HOST_MODULES = [symbol.split(":")[0] for symbol in PATCHES[0].symbols]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are not applied where CUDA is there")

ORIGINALS: dict[str, Any] = {name: getattr(torch, name) for name in FACTORIES}


def resolve(symbol: str) -> Any:
    """The object a patch names as "module:attribute.attribute"."""
    module, path = symbol.split(":")
    found: Any = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found


@pytest.fixture
def adapted() -> None:
    """As policy/runtime does: the model's modules are imported, then adapted."""
    importlib.import_module("gspo_megatron.policy.model")
    for module in HOST_MODULES:
        importlib.import_module(module)
    assert adapt()


def called_from(module: str, function: str) -> Callable[..., Any]:
    """`function`, a lambda's source, as if it stood in the module."""
    return eval(function, {"__name__": module, "torch": torch})


# --- what is replaced --------------------------------------------------------------------------------------------


def test_the_adaptation_is_for_the_installed_version() -> None:
    assert importlib.metadata.version("megatron-core") == "0.16.1"
    assert "0.16.1" in (cpu_adaptation.__doc__ or "")


@pytest.mark.parametrize(("patch", "symbol"), SYMBOLS)
def test_what_a_patch_replaces_exists(patch: str, symbol: str) -> None:
    assert resolve(symbol) is not None


def test_patches_are_named_and_explained_and_each_relies_on_something() -> None:
    names = [patch.apply.__name__ for patch in PATCHES]
    assert len(set(names)) == len(names)
    assert all(patch.symbols and inspect.getdoc(patch.apply) for patch in PATCHES)


@pytest.mark.parametrize("module", HOST_MODULES)
def test_the_module_still_speaks_to_cuda(module: str) -> None:
    """Where it no longer does, its line can go."""
    source = inspect.getsource(importlib.import_module(module))
    assert "torch.cuda." in source or 'device="cuda"' in source


def test_the_optimizer_still_sorts_parameters_by_the_name_of_their_type() -> None:
    for module in ("optimizer", "distrib_optimizer", "clip_grads"):
        source = inspect.getsource(importlib.import_module(f"megatron.core.optimizer.{module}"))
        assert ".type()" in source and "'torch.cuda.FloatTensor'" in source


def test_the_router_still_reads_a_name_that_only_transformer_engine_sets() -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    assert "te_general_gemm is not None" in inspect.getsource(moe_utils.RouterGatingLinearFunction)
    assert "te_general_gemm," in inspect.getsource(moe_utils).split("except ImportError")[0]


def test_latent_attention_still_takes_transformer_engine_for_installed() -> None:
    source = inspect.getsource(importlib.import_module("megatron.core.transformer.multi_latent_attention"))
    assert "    HAVE_TE = True\nexcept ImportError" in source
    assert "HAVE_TE\n            and isinstance(self.linear_proj, TELinear)" in source


# --- what Megatron sees ------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("module", HOST_MODULES)
def test_megatrons_torch_is_the_host(adapted: None, module: str) -> None:
    seen = importlib.import_module(module).torch
    assert seen.cuda.current_device() == torch.device("cpu")
    for name in FACTORIES:
        arguments = {"full": ((2,), 3.0), "tensor": ([1, 2],), "arange": (2,)}.get(name, (2,))
        for device in ("cuda", torch.device("cuda", 0), "cpu", None):
            assert getattr(seen, name)(*arguments, device=device).device.type == "cpu"
    assert torch.equal(seen.zeros(2, device="cuda", pin_memory=True), torch.zeros(2))
    assert seen.ones(2, dtype=torch.int32, device="cuda").dtype == torch.int32
    with seen.cuda.stream(seen.cuda.Stream()):
        seen.cuda.current_stream().wait_stream(seen.cuda.default_stream())
        seen.cuda.synchronize()
    assert seen.cuda.Event().record() is None and seen.cuda.Event().query()
    assert seen.nn is torch.nn and seen.Tensor is torch.Tensor and seen.distributed is torch.distributed
    assert not seen.cuda.is_available()


@needs_cpu
def test_every_loaded_module_of_megatron_sees_the_host(adapted: None) -> None:
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core") and hasattr(m, "torch")]
    before = [m.__name__ for m in loaded if m.torch is torch]
    assert len(loaded) > 30
    assert not before, "imported after adapt(), these would call CUDA"


@needs_cpu
def test_the_random_state_is_the_hosts(adapted: None) -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    torch.manual_seed(3)
    state = random._get_cuda_rng_state()
    first = torch.rand(4)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    assert torch.equal(random.torch.cuda.get_rng_state(), torch.get_rng_state())


@needs_cpu
def test_the_optimizer_reads_cuda_in_the_type_of_a_tensor(adapted: None) -> None:
    ask = "lambda t, *a: t.type(*a)"
    for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        optimizer = called_from(module, ask)
        assert optimizer(torch.zeros(1)) == "torch.cuda.FloatTensor"
        assert optimizer(torch.zeros(1).bfloat16()) == "torch.cuda.BFloat16Tensor"
        assert optimizer(torch.nn.Parameter(torch.zeros(1))) == "torch.cuda.FloatTensor"
        assert optimizer(torch.zeros(1), torch.float64).dtype == torch.float64
    for module in ("megatron.core.models.gpt.gpt_model", "gspo_megatron.policy.model", "__main__"):
        assert called_from(module, ask)(torch.zeros(1)) == "torch.FloatTensor"


@needs_cpu
def test_cuda_of_a_tensor_is_the_tensor_in_megatron_alone(adapted: None) -> None:
    ask = "lambda t: t.cuda()"
    value = torch.ones(2)
    assert called_from("megatron.core.models.common.language_module.language_module", ask)(value) is value
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        called_from("some.other.module", ask)(value)


def test_the_router_runs_without_transformer_engine(adapted: None) -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    out = moe_utils.RouterGatingLinearFunction.apply(hidden, weight, None, torch.float32)
    assert torch.allclose(out, hidden @ weight.T)
    out.sum().backward()
    assert hidden.grad is not None and torch.allclose(hidden.grad, weight.sum(0).expand(5, 4))


@needs_cpu
def test_split_sizes_of_the_dispatcher_are_numbers(adapted: None) -> None:
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    sizes = torch.tensor([2, 0, 3])
    moved = dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True)
    assert isinstance(moved, np.ndarray) and moved.tolist() == [2, 0, 3]
    assert dispatcher.maybe_move_tensor_to_cpu(sizes) is sizes
    assert dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


@needs_cpu
def test_replaced_functions_are_called_as_the_originals_are(adapted: None) -> None:
    """The originals come from a fresh copy of their modules; callers pass all but the tensor by name or place."""
    for symbol in (
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
    ):
        module, name = symbol.split(":")
        specification = importlib.util.find_spec(module)
        assert specification is not None and specification.loader is not None
        fresh = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(fresh)
        patched = module.replace("moe_utils", "token_dispatcher")
        original = list(inspect.signature(getattr(fresh, name)).parameters.values())
        replacement = getattr(importlib.import_module(patched), name)
        assert replacement.__module__ == cpu_adaptation.__name__
        ours = list(inspect.signature(replacement).parameters.values())
        assert [(p.name, p.default) for p in ours[1:]] == [(p.name, p.default) for p in original[1:]], symbol


# --- what everyone else sees -------------------------------------------------------------------------------------


def test_torch_itself_is_unchanged(adapted: None) -> None:
    for name, original in ORIGINALS.items():
        assert getattr(torch, name) is original
        assert type(original).__name__ == "builtin_function_or_method"
    assert torch.cuda.current_device.__module__ == torch.cuda.manual_seed.__module__.removesuffix(".random")
    assert torch.cuda.Stream.__module__ == "torch.cuda.streams"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64


def snapshot() -> dict[str, Any]:
    """Every object that a patch replaces."""
    found = {symbol: resolve(symbol) for _, symbol in SYMBOLS}
    return found | {"torch.Tensor.type": Tensor.type, "torch.Tensor.cuda": Tensor.cuda}


def test_adapting_twice_changes_nothing_more(adapted: None) -> None:
    before = snapshot()
    adapt()
    after = snapshot()
    assert all(before[symbol] is after[symbol] for symbol in before)


def test_where_cuda_is_only_what_fails_there_too_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    recorders = tuple(
        Patch(lambda name=p.apply.__name__: applied.append(name), p.symbols, p.on_cuda_too)  # type: ignore[misc]
        for p in PATCHES
    )
    monkeypatch.setattr(cpu_adaptation, "PATCHES", recorders)
    monkeypatch.setattr(cpu_adaptation, "_adapted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = snapshot()
    assert adapt() is False and adapt() is False
    assert applied == ["te_general_gemm", "token_permutation", "te_version", "latent_attention"]
    assert all(before[symbol] is value for symbol, value in snapshot().items())


def test_without_cuda_every_patch_is_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    recorders = tuple(
        Patch(lambda name=p.apply.__name__: applied.append(name), p.symbols, p.on_cuda_too)  # type: ignore[misc]
        for p in PATCHES
    )
    monkeypatch.setattr(cpu_adaptation, "PATCHES", recorders)
    monkeypatch.setattr(cpu_adaptation, "_adapted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert adapt() is True and adapt() is True
    assert applied == [p.apply.__name__ for p in PATCHES]
