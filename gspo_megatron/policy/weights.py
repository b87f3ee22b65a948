"""Weights into the policy's model, and out to engines and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.families.base import Family, ModelFields
from gspo_megatron.weights.gather import GatherCounters, GatherPlan, gather_buckets, plan_gather
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint, random_tensor
from gspo_megatron.weights.rules import TensorSpec

BUCKET_NUMEL = 64 * 2**20


class PolicyWeights:
    """The rule table of the model applied to this rank's parameters."""

    def __init__(
        self, family: Family, fields: ModelFields, groups: ProcessGroups, parameters: Sequence[tuple[str, Tensor]]
    ) -> None:
        self.fields, self.groups = fields, groups
        self.specs = family.specs(fields)
        self.parameters = dict(parameters)
        self.counters = GatherCounters()
        self._plans: dict[tuple[int, ...], GatherPlan] = {}
        known = {spec.megatron for spec in self.specs}
        assert self.parameters.keys() <= known, f"parameters without a rule: {sorted(self.parameters.keys() - known)}"

    @torch.no_grad()
    def load(self, folder: str | Path) -> HFCheckpoint:
        """Read this rank's share of an HF folder. UserError unless its tensors are exactly the model's."""
        checkpoint = HFCheckpoint(folder)
        checkpoint.verify(self.specs)
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
            parameter = self.parameters.get(spec.megatron)
            if parameter is None:
                continue
            whole = spec.codec.to_megatron(read(spec))
            if spec.dim is not None:
                index = place.expert_tensor if spec.expert is not None else place.tensor
                whole = spec.codec.shard(whole, spec.dim, index, spec.num_shards(layout))
            assert whole.shape == parameter.shape, (spec.megatron, whole.shape, parameter.shape)
            parameter.copy_(whole)

    def export(self, destinations: Sequence[int]) -> Iterator[list[NamedTensor]]:
        """Buckets of HF-named tensors at the destination ranks; empty lists elsewhere. Collective."""
        plan = self._plans.get(tuple(destinations))
        if plan is None:
            plan = self._plans[tuple(destinations)] = plan_gather(
                self.specs,
                self.groups.layout,
                num_layers=self.fields.num_layers,
                num_experts=self.fields.num_experts,
                destinations=destinations,
                bucket_numel=BUCKET_NUMEL,
            )
        local = {name: p.detach() for name, p in self.parameters.items()}
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
