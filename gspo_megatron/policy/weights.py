"""Weights into the policy's model, and out to engines and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.weights.families.base import Family, ModelFields
from gspo_megatron.weights.gather import GatherCounters, GatheredBucket, gather_buckets
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint, random_tensor
from gspo_megatron.weights.reshard import ReshardPlan, plan_reshard
from gspo_megatron.weights.rules import TensorSpec

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the rule table lies on this rank: a parameter, a slice of one that stacks experts, or a
    buffer, which no optimizer changes."""

    name: str  # TensorSpec.megatron
    parameter: Tensor
    index: int | None = None  # along the parameter's first axis

    def of(self, tensor: Tensor) -> Tensor:
        """This slot's part of a tensor that is laid out like the parameter, such as its gradient."""
        return tensor if self.index is None else tensor[self.index]

    @property
    def tensor(self) -> Tensor:
        """A view of the weights. Taken anew each time: DDP moves parameters into buffers of its own."""
        return self.of(self.parameter.detach())


class PolicyWeights:
    """The rule table of the model applied to this rank's parameters."""

    def __init__(self, family: Family, fields: ModelFields, groups: ProcessGroups, slots: Iterable[Slot]) -> None:
        self.fields, self.groups = fields, groups
        self.specs = family.specs(fields)
        self.slots = {slot.name: slot for slot in slots}
        self.counters = GatherCounters()
        self._plans: dict[object, ReshardPlan] = {}
        known = {spec.megatron for spec in self.specs}
        assert self.slots.keys() <= known, f"parameters without a rule: {sorted(self.slots.keys() - known)}"

    @property
    def parameters(self) -> list[Parameter]:
        """This rank's parameters, each once; no buffers."""
        held = {id(slot.parameter): slot.parameter for slot in self.slots.values()}
        return [tensor for tensor in held.values() if isinstance(tensor, Parameter)]

    @torch.no_grad()
    def load(self, folder: str | Path) -> HFCheckpoint:
        """Read this rank's share of an HF folder. UserError unless its tensors are exactly the model's."""
        checkpoint = HFCheckpoint(folder)
        checkpoint.verify(self.specs, left_out=self.fields.left_out)
        self._fill(lambda spec: [checkpoint.read(name) for name in spec.hf])
        return checkpoint

    @torch.no_grad()
    def randomize(self, seed: int) -> None:
        """Initial weights as a function of each tensor's name: the same in every layout."""
        std = self.fields.initializer_range
        self._fill(
            lambda spec: [
                random_tensor(name, shape, std=std, seed=seed)
                for name, shape in zip(spec.hf, spec.hf_shapes, strict=True)
            ]
        )

    def _fill(self, read: Callable[[TensorSpec], list[Tensor]]) -> None:
        layout, place = self.groups.layout, self.groups.coordinates
        for spec in self.specs:
            slot = self.slots.get(spec.megatron)
            if slot is None:
                continue
            whole = spec.codec.to_megatron(read(spec))
            if spec.dim is not None:
                index = place.expert_tensor if spec.expert is not None else place.tensor
                if spec.stacks_experts:
                    index = place.expert
                whole = spec.codec.shard(whole, spec.dim, index, spec.num_shards(layout))
            assert whole.shape == slot.tensor.shape, (spec.megatron, whole.shape, slot.tensor.shape)
            slot.tensor.copy_(whole)

    def plan(
        self, feeds: Sequence[Sequence[int]], *, dtype: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES
    ) -> ReshardPlan:
        """How the weights reach the feeds, made once; see `plan_reshard`. `dtype` None: that of the parameters."""
        dtype = dtype or self.parameters[0].dtype
        key = (tuple(map(tuple, feeds)), dtype, bucket_bytes)
        if key not in self._plans:
            self._plans[key] = plan_reshard(
                self.specs,
                self.groups.layout,
                num_layers=self.fields.num_layers,
                num_experts=self.fields.num_experts,
                feeds=feeds,
                dtype=dtype,
                bucket_bytes=bucket_bytes,
            )
        return self._plans[key]

    def export(self, plan: ReshardPlan, local: Mapping[str, Tensor] | None = None) -> Iterator[GatheredBucket]:
        """One bucket a step of the plan, for the rank that sends it. Collective over all ranks.

        `local` gives other tensors than the weights, laid out like them, by slot name: gradients, say.
        """
        if local is None:
            local = {name: slot.tensor for name, slot in self.slots.items()}
        yield from gather_buckets(plan, local, self.groups, self.counters)


class ReferenceWeights:
    """A copy of this rank's parameters that can take their place for a while."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.other = [p.detach().clone() for p in self.parameters]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exception: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, other in zip(self.parameters, self.other, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(current)
