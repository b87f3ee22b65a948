"""What tests/unit/policy/test_experts.py runs in a process of its own. Functions return plain data to compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy import experts as experts_module
from gspo_megatron.policy.experts import GroupedExperts
from gspo_megatron.policy.runtime import initialize

LOADED = (filesystem_async, state_dict_saver)  # before the adaptation to the CPU, which reaches loaded modules only
EXPERTS, HIDDEN, FFN = 4, 16, 24


def alone(port: int) -> None:
    """Join a job of this process alone."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    initialize(ParallelLayout(), seed=0, timeout_s=30.0)


@dataclass(frozen=True)
class FakeGroup:
    """A process group for those who only ask for its numbers."""

    count: int = 1
    place: int = 0

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.place


def fake_groups(*, ep: FakeGroup = FakeGroup(), etp: FakeGroup = FakeGroup(), edp: FakeGroup = FakeGroup()) -> Any:
    groups = ProcessGroupCollection()
    groups.ep, groups.expt_tp, groups.expt_dp = ep, etp, edp  # type: ignore[assignment]
    return groups


def make_config(dtype: torch.dtype, *, experts: int = EXPERTS, ffn: int = FFN, **changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": experts,
        "moe_router_topk": min(2, experts),
        "moe_ffn_hidden_size": ffn,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**settings | changes)


def make_sequential(config: TransformerConfig, groups: Any = None) -> SequentialMLP:
    groups = groups or get_default_pg_collection()
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts).submodules.experts
    return build_module(spec, config.num_moe_experts // groups.ep.size(), config, pg_collection=groups)


def make_grouped(config: TransformerConfig, groups: Any = None) -> GroupedExperts:
    groups = groups or get_default_pg_collection()
    spec = ModuleSpec(module=GroupedExperts)
    return build_module(spec, config.num_moe_experts // groups.ep.size(), config, pg_collection=groups)


def stacked(module: Any, of: str = "data") -> list[Tensor]:
    """The weights, or their gradients, of either module as [E, 2F, H] and [E, H, F]."""
    if isinstance(module, GroupedExperts):
        return [getattr(module.weight1, of), getattr(module.weight2, of)]
    layers = ("linear_fc1", "linear_fc2")
    return [torch.stack([getattr(getattr(e, n).weight, of) for e in module.local_experts]) for n in layers]


@torch.no_grad()
def fill(module: Any, weights: Sequence[Tensor]) -> None:
    if isinstance(module, GroupedExperts):
        module.weight1.copy_(weights[0])
        module.weight2.copy_(weights[1])
        return
    for i, expert in enumerate(module.local_experts):
        expert.linear_fc1.weight.copy_(weights[0][i])
        expert.linear_fc2.weight.copy_(weights[1][i])


def make_weights(experts: int, ffn: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(experts, 2 * ffn, HIDDEN), (experts, HIDDEN, ffn)]
    return [(0.3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [T, H]
    probs: Tensor  # [T] float32
    upstream: Tensor  # [T, H]


def make_inputs(tokens: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(7)
    hidden, upstream = (torch.randn(tokens, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    return Inputs(hidden, torch.rand(tokens, generator=generator), upstream)


def run(module: Any, counts: list[int], inputs: Inputs) -> dict[str, Tensor]:
    """Output and all gradients."""
    hidden, probs = inputs.hidden.clone().requires_grad_(), inputs.probs.clone().requires_grad_()
    output, bias = module(hidden, torch.tensor(counts), probs)
    assert bias is None
    output.backward(inputs.upstream)
    weight1, weight2 = stacked(module, "grad")
    assert hidden.grad is not None and probs.grad is not None
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "probs": probs.grad,
        "weight1": weight1,
        "weight2": weight2,
    }


def definition(weights: Sequence[Tensor], counts: list[int], inputs: Inputs) -> dict[str, Tensor]:
    """The same by a plain loop in float64."""
    w1, w2, hidden, probs = (
        t.double().detach().requires_grad_() for t in (weights[0], weights[1], inputs.hidden, inputs.probs)
    )
    rows, start = [], 0
    for expert, count in enumerate(counts):
        for token in range(start, start + count):
            gate, up = (w1[expert] @ hidden[token]).chunk(2)
            rows.append(probs[token] * (w2[expert] @ (gate / (1 + torch.exp(-gate)) * up)))
        start += count
    output = torch.stack(rows)
    output.backward(inputs.upstream.double())
    found = {"hidden": hidden.grad, "probs": probs.grad, "weight1": w1.grad, "weight2": w2.grad}
    return {"output": output.detach()} | {name: t for name, t in found.items() if t is not None}


def compare(dtype: torch.dtype, counts: list[int], **changes: Any) -> dict[str, Any]:
    """Both modules, and the definition where there are tokens."""
    config = make_config(dtype, experts=len(counts), **changes)
    weights, inputs = make_weights(len(counts), FFN, dtype), make_inputs(sum(counts), dtype)
    results: dict[str, Any] = {}
    for name, make in (("sequential", make_sequential), ("grouped", make_grouped)):
        module = make(config)
        fill(module, weights)
        results[name] = run(module, counts, inputs)
    results["definition"] = definition(weights, counts, inputs) if sum(counts) else None
    return results


def activation() -> dict[str, Tensor]:
    """bfloat16 experts whose products only copy: what comes out is the weighted activation, bit for bit."""
    half = HIDDEN // 2
    config = make_config(torch.bfloat16, experts=2, ffn=half)
    identity = torch.eye(HIDDEN).bfloat16()
    weights = [identity.expand(2, -1, -1), identity[:, :half].expand(2, -1, -1)]
    inputs = make_inputs(64, torch.bfloat16)
    results = {}
    for name, make in (("sequential", make_sequential), ("grouped", make_grouped)):
        module = make(config)
        fill(module, weights)
        results[name] = run(module, [40, 24], inputs)["output"]
    return results


CLAMPED: dict[str, Any] = {
    "add_bias_linear": True,
    "activation_func": quick_gelu,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 0.5,  # reached by many
}


def with_biases(counts: list[int], **changes: Any) -> dict[str, dict[str, Tensor]]:
    """gpt-oss's experts, and the same by a plain loop in float64."""
    module, inputs = (
        make_grouped(make_config(torch.float32, **CLAMPED, **changes)),
        make_inputs(sum(counts), torch.float32),
    )
    weights = make_weights(EXPERTS, FFN, torch.float32)
    generator = torch.Generator().manual_seed(6)
    biases = [torch.randn(EXPERTS, size, generator=generator) for size in (2 * FFN, HIDDEN)]
    fill(module, weights)
    with torch.no_grad():
        module.bias1.copy_(biases[0])
        module.bias2.copy_(biases[1])
    found = run(module, counts, inputs)
    found |= {name: getattr(module, name).grad for name in ("bias1", "bias2")}
    w1, w2, b1, b2, x, p = (t.double().requires_grad_() for t in (*weights, *biases, inputs.hidden, inputs.probs))
    rows, expert = [], torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    for token, e in enumerate(expert.tolist()):
        gate, up = (w1[e] @ x[token] + b1[e]).chunk(2)
        gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
        rows.append(p[token] * (w2[e] @ (gate * torch.sigmoid(1.702 * gate) * (up + 1)) + b2[e]))
    output = torch.stack(rows) if rows else x * 0
    total = (output * inputs.upstream.double()).sum() + sum((t * 0).sum() for t in (w1, w2, b1, b2, x, p))
    grads = torch.autograd.grad(total, (w1, w2, b1, b2, x, p))
    names = ("weight1", "weight2", "bias1", "bias2", "hidden", "probs")
    return {"found": found, "definition": {"output": output.detach(), **dict(zip(names, grads, strict=True))}}


def moe_layer(dtype: torch.dtype, dispatcher: str) -> dict[str, Any]:
    """A whole MoE layer, router and dispatcher included, with either experts."""
    config = make_config(dtype, moe_token_dispatcher_type=dispatcher)
    results = {}
    for name in ("sequential", "grouped"):
        spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS)
        experts = spec.submodules.experts if name == "sequential" else GroupedExperts
        layer = MoELayer(config, MoESubmodules(experts=experts), layer_number=1)
        fill(layer.experts, make_weights(EXPERTS, FFN, dtype))
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            layer.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator))
        hidden = torch.randn(13, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
        output, bias = layer(hidden)
        assert bias is None
        output.sum().backward()  # an expanded gradient
        weight1, weight2 = stacked(layer.experts, "grad")
        results[name] = {
            "output": output.detach(),
            "hidden": hidden.grad,
            "router": layer.router.weight.grad,
            "weight1": weight1,
            "weight2": weight2,
        }
    return results


def expanded_gradient() -> bool:
    """An upstream gradient of stride 0 straight into the module."""
    module = make_grouped(make_config(torch.float32))
    fill(module, make_weights(EXPERTS, FFN, torch.float32))
    inputs, counts = make_inputs(6, torch.float32), torch.tensor([1, 2, 0, 3])
    module(inputs.hidden, counts, inputs.probs)[0].sum().backward()
    found = stacked(module, "grad")
    module.zero_grad()
    module(inputs.hidden, counts, inputs.probs)[0].backward(torch.ones_like(inputs.hidden))
    return all(torch.equal(a, b) for a, b in zip(found, stacked(module, "grad"), strict=True))


def expert_tensor_shards(degree: int, counts: list[int]) -> dict[str, Any]:
    """Shards of every expert: their outputs and gradients by input add up, their gradients by weight are slices."""
    config = make_config(torch.float32)
    weights, inputs = make_weights(EXPERTS, FFN, torch.float32), make_inputs(sum(counts), torch.float32)
    whole = make_grouped(config)
    fill(whole, weights)
    gates, ups = weights[0].chunk(2, dim=1)
    shards = []
    for rank in range(degree):
        module = make_grouped(config, fake_groups(etp=FakeGroup(degree, rank)))
        cut = [t.chunk(degree, dim=1)[rank] for t in (gates, ups)]
        fill(module, [torch.cat(cut, dim=1), weights[1].chunk(degree, dim=2)[rank]])
        shards.append(run(module, counts, inputs))
    joined = {name: sum(s[name] for s in shards) for name in ("output", "hidden", "probs")}
    halves = [s["weight1"].chunk(2, dim=1) for s in shards]
    joined["weight1"] = torch.cat([h[0] for h in halves] + [h[1] for h in halves], dim=1)
    joined["weight2"] = torch.cat([s["weight2"] for s in shards], dim=2)
    return {"whole": run(whole, counts, inputs), "joined": joined}


def recompute(counts: list[int]) -> dict[str, Any]:
    """With and without recomputing the activation: results, and bytes kept between forward and backward."""
    found: dict[str, Any] = {}
    for name, changes in (
        ("kept", {}),
        ("recomputed", {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}),
    ):
        module = make_grouped(make_config(torch.float32, moe_grouped_gemm=True, **changes))
        fill(module, make_weights(EXPERTS, FFN, torch.float32))
        inputs = make_inputs(sum(counts), torch.float32)
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden, probs = inputs.hidden.clone().requires_grad_(), inputs.probs.clone().requires_grad_()
            module(hidden, torch.tensor(counts), probs)
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().size() for t in saved if t.data_ptr() not in own}
        found[name] = {"bytes": sum(sizes.values()), "results": run(module, counts, inputs)}
        with torch.no_grad():
            found[name]["no_grad"] = module(inputs.hidden, torch.tensor(counts), inputs.probs)[0]
    return found


class PoisonEmptyGroups(torch.autograd.Function):
    """grouped_mm whose backward leaves garbage in the weight's gradient of groups without rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offs)
        return F.grouped_mm(x, weight, offs=offs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, offs = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            output = F.grouped_mm(x, weight, offs=offs)
            by_x, by_weight = torch.autograd.grad(output, (x, weight), gradients[0])
        by_weight[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return by_x, by_weight, None


class PoisonedFunctional:
    """torch.nn.functional with that product."""

    silu = staticmethod(F.silu)

    @staticmethod
    def grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        return PoisonEmptyGroups.apply(x, weight, offs)


def unwritten_gradients(counts: list[int]) -> dict[str, Any]:
    module = make_grouped(make_config(torch.float32))
    fill(module, make_weights(EXPERTS, FFN, torch.float32))
    inputs = make_inputs(sum(counts), torch.float32)
    found = {"sound": run(module, counts, inputs)}
    experts_module.F = PoisonedFunctional  # type: ignore[assignment]
    try:
        for name, zero in (("left", False), ("zeroed", True)):
            module.zero_grad()
            module.zero_empty_groups = zero
            found[name] = run(module, counts, inputs)
    finally:
        experts_module.F = F
    return found


def attributes(dtype: torch.dtype) -> list[dict[str, Any]]:
    module = make_grouped(make_config(dtype)).to(dtype=dtype)  # as the model is moved to its device
    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
    return [
        {n: getattr(p, n) for n in names} | {"dtype": p.dtype, "device": p.device.type} for p in module.parameters()
    ]


def describe(state: Any) -> list[tuple[Any, ...]]:
    """What a checkpoint is told of each tensor, and of each object."""
    apply_factories(state)
    tensors = [t for t in nested_values(state) if isinstance(t, ShardedTensor)]
    objects = [o for o in nested_values(state) if isinstance(o, ShardedObject)]
    assert len(tensors) + len(objects) == len(list(nested_values(state)))
    return sorted((o.key, o.global_shape, o.global_offset, o.replica_id, o.data) for o in objects) + sorted(
        (
            t.key,
            tuple(t.global_shape),
            tuple(t.global_offset),
            tuple(t.local_shape),
            tuple(t.axis_fragmentations),
            t.prepend_axis_num,
            t.replica_id,
            str(t.dtype),
            t.data.flatten().tolist(),
        )
        for t in tensors
    )


def sharded_state(ep: tuple[int, int], etp: tuple[int, int], offsets: tuple[Any, ...]) -> dict[str, Any]:
    groups = fake_groups(ep=FakeGroup(*ep), etp=FakeGroup(*etp), edp=FakeGroup(3, 2))
    config = make_config(torch.float32)
    found: dict[str, Any] = {}
    for name, make in (("sequential", make_sequential), ("grouped", make_grouped)):
        module = make(config, groups)
        fill(module, [w[: EXPERTS // ep[0]] for w in make_weights(EXPERTS, FFN // etp[0], torch.float32)])
        found[name] = describe(module.sharded_state_dict("decoder.mlp.experts.", offsets))
    module = make_grouped(config, groups)
    state = module.sharded_state_dict("x.")
    found["parameters_themselves"] = [state[f"x.{n}"].data is p for n, p in module.named_parameters()]
    return found


def checkpoint(folder: str) -> dict[str, Any]:
    """Save one, load into the other, both ways."""
    config, weights = make_config(torch.float32), make_weights(EXPERTS, FFN, torch.float32)
    makers = {"sequential": make_sequential, "grouped": make_grouped}
    found: dict[str, Any] = {}
    for source, target in (("sequential", "grouped"), ("grouped", "sequential"), ("grouped", "grouped")):
        path = Path(folder) / f"{source}_{target}"
        path.mkdir()
        module = makers[source](config)
        fill(module, weights)
        dist_checkpointing.save(module.sharded_state_dict("experts."), str(path))
        other = makers[target](config)
        fill(other, [torch.zeros_like(w) for w in weights])
        state = dist_checkpointing.load(other.sharded_state_dict("experts."), str(path))
        torch.nn.ModuleDict({"experts": other}).load_state_dict(state)  # strict, as a part of a model
        found[f"{source} -> {target}"] = all(torch.equal(a, b) for a, b in zip(stacked(other), weights, strict=True))
    return found
