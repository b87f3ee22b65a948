"""Gradient norms by expert, from gradients that lie in shards over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.weights import PolicyWeights


def expert_gradient_norms(
    chunks: Sequence[DistributedDataParallel], weights: PolicyWeights, groups: ProcessGroups
) -> Tensor:
    """Norm of the gradient of all weights of each expert; between the reduction and the optimizer's step. Collective.

    Each element of the gradient is counted by one rank: the distributed optimizer leaves it reduced on one alone, and
    otherwise the first of the ranks that hold the same one counts.

    Returns:
        [MoE layers, experts] float64, on every rank; [0, 0] of a dense model.
    """
    fields = weights.fields
    layers = {layer: i for i, layer in enumerate(fields.moe_layers)}
    squares = torch.zeros(
        len(layers), fields.num_experts or 0, dtype=torch.float64, device=chunks[0].buffers[0].grad_data.device
    )
    if not squares.numel():
        return squares
    places = _places(weights, groups, layers)
    for chunk in chunks:
        for gradient, parameter, start in _owned(chunk):
            experts = places.get(id(parameter), [])
            if not experts:
                continue
            numel = parameter.numel() // len(experts)
            for number, (layer, expert) in enumerate(experts):
                low = max(number * numel - start, 0)
                high = min((number + 1) * numel - start, gradient.numel())
                if low < high:
                    norm = torch.linalg.vector_norm(gradient[low:high], dtype=torch.float64)
                    squares[layer, expert] += norm.square()
    dist.all_reduce(squares, group=groups.world)
    return squares.sqrt()


def _owned(chunk: DistributedDataParallel) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(flat piece of a gradient, its parameter, where the piece starts in the parameter) that this rank counts."""
    for group in chunk.expert_parallel_bucket_groups:
        if chunk.ddp_config.use_distributed_optimizer:
            ranks = group.intra_distributed_optimizer_instance_group
            size, rank = ranks.size(), ranks.rank()
        else:
            size, rank = 1, 0
            if group.data_parallel_group.rank() > 0:
                continue
        for bucket in group.buckets:
            share = bucket.grad_data.numel() // size
            begin, end = rank * share, (rank + 1) * share
            for parameter, (first, last) in bucket.param_to_index.items():
                low, high = max(first, begin), min(last, end)
                if low < high:
                    yield bucket.grad_data[low:high], parameter, low - first


def _places(weights: PolicyWeights, groups: ProcessGroups, layers: dict[int, int]) -> dict[int, list[tuple[int, int]]]:
    """By parameter (its id), the (MoE layer, expert) of each entry along its first axis, or of the whole parameter.

    Left out are parameters whose gradient another expert-tensor-parallel rank counts.
    """
    specs = {spec.megatron: spec for spec in weights.specs}
    experts_here = (weights.fields.num_experts or 0) // groups.layout.expert
    first = groups.ep.rank() * experts_here
    places: dict[int, list[tuple[int, int]]] = {}
    for name, slot in weights.slots.items():
        spec = specs[name]
        if spec.expert is None and not spec.stacks_experts:
            continue
        if spec.dim is None and groups.etp.rank() > 0:
            continue
        layer = layers[int(name.split(".")[2])]
        experts = range(first, first + experts_here) if spec.expert is None else [spec.expert]
        places.setdefault(id(slot.parameter), []).extend((layer, expert) for expert in experts)
    return places
