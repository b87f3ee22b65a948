"""What AdamW keeps of each parameter on this rank, whichever of Megatron's optimizers holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"  # the float32 values that the optimizer updates


@dataclass(frozen=True)
class OptimizerShard:
    """A part of one parameter that this rank's optimizer updates."""

    parameter: Parameter
    start: int  # of the part, in the flattened parameter
    main: Tensor  # [n] what AdamW updates: a view of the parameter, or values of its own
    moments: dict[str, Tensor]  # [n] each
    is_shared_out: bool  # each data-parallel rank has a part of its own, rather than all of it

    @property
    def part(self) -> Tensor:
        """[n] the parameter's own values, a view."""
        return self.parameter.detach().view(-1)[self.start : self.start + self.main.numel()]

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it besides the weights: main values where they are more precise."""
        return self.moments | ({MAIN: self.main} if self.main.dtype != self.parameter.dtype else {})

    def follow_parameter(self) -> None:
        """Set main values of its own to the parameter's."""
        self.main.copy_(self.part)


def optimizer_shards(optimizer: Any) -> list[OptimizerShard]:
    """All parts that this rank updates. Moments that no step has made yet are made, as zeros."""
    shards = []
    for part in parts(optimizer):
        for parameter, start, owned in _owned(part):
            adam, tensor = _innermost(part.optimizer, owned)
            state = adam.state[tensor]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(tensor)
            if _counts_by_parameter(adam) and "step" not in state:
                state["step"] = torch.tensor(0.0)
            moments = {name: state[name].detach().view(-1) for name in MOMENTS}
            is_shared_out = isinstance(part, DistributedOptimizer)
            shards.append(OptimizerShard(parameter, start, tensor.detach().view(-1), moments, is_shared_out))
    _publish(optimizer)
    return shards


def parts(optimizer: Any) -> list[Any]:
    """A MoE model has an optimizer for dense parameters and one for experts."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def steps_done(optimizer: Any) -> int:
    """Steps that AdamW counts, the same for all parameters; 0 before the first."""
    counts = {int(holder["step"]) for holder in _step_holders(optimizer) if "step" in holder}
    assert len(counts) <= 1, f"parameters have seen different numbers of steps: {sorted(counts)}"
    return counts.pop() if counts else 0


def set_steps_done(optimizer: Any, steps: int) -> None:
    """Set the count of every parameter. Each gets a tensor of its own: AdamW adds one to each in place."""
    for holder in _step_holders(optimizer):
        holder["step"] = steps if "params" in holder else torch.tensor(float(steps))
    _publish(optimizer)


def _owned(part: Any) -> Iterator[tuple[Parameter, int, Tensor]]:
    """(parameter of the model, where the part starts in it, the tensor that the optimizer was given for it)."""
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, places in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[parameter]
                        yield parameter, places["param"].start, groups[group]["params"][order]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for ours, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(ours, mains, strict=True):
                yield parameter, 0, main
        for ours in part.fp32_from_fp32_groups:
            for parameter in ours:
                yield parameter, 0, parameter
    else:
        for group in groups:
            for parameter in group["params"]:
                yield parameter, 0, parameter


def _innermost(optimizer: Any, owned: Tensor) -> tuple[Any, Tensor]:
    """The AdamW that updates a tensor, and which tensor it updates for it. Under offloading both are further in."""
    if not isinstance(optimizer, HybridDeviceOptimizer):
        return optimizer, owned
    tensor = optimizer.param_to_inner_param[owned]
    for adam in optimizer.sub_optimizers:
        if any(p is tensor for group in adam.param_groups for p in group["params"]):
            return adam, tensor
    raise AssertionError("a parameter that no optimizer updates")


def _counts_by_parameter(adam: Any) -> bool:
    """torch's AdamW does; Transformer Engine's counts the steps of a group."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)


def _step_holders(optimizer: Any) -> Iterator[dict[str, Any]]:
    """Where AdamW keeps its counts."""
    for part in parts(optimizer):
        inner = part.optimizer
        for adam in inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]:
            yield from adam.state.values() if _counts_by_parameter(adam) else adam.param_groups


def _publish(optimizer: Any) -> None:
    """Let offloading optimizers see what was changed in those further in."""
    for part in parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_sub_optimizers_state_to_hdo()
