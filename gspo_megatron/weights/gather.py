"""Weights from the Megatron layout to the ranks that feed an engine, as buckets of HF-named tensors.

The plan is pure: every rank computes the same one from (specs, layout, destinations). Its execution
sends each shard from one owner straight to the destinations that lack it; other ranks never hold more
than their own shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.rules import TensorSpec


@dataclass(frozen=True)
class Move:
    """One shard of one parameter, from its owner to one destination."""

    spec: int  # index into GatherPlan.specs
    shard: int
    source: int  # global rank
    destination: int  # global rank; equal to source where it already is


@dataclass(frozen=True)
class GatherPlan:
    """Which rank sends which shard to which destination in which bucket."""

    specs: tuple[TensorSpec, ...]
    layout: ParallelLayout
    shard_shapes: tuple[torch.Size, ...]  # of each spec's shards, which are all alike
    buckets: tuple[tuple[int, ...], ...]  # spec indices, in export order
    moves: tuple[tuple[Move, ...], ...]  # per bucket

    def sent_numel(self, rank: int) -> int:
        """Elements that leave a rank, padding rows of the vocabulary included."""
        moves = (m for bucket in self.moves for m in bucket if m.source == rank != m.destination)
        return sum(self.shard_shapes[m.spec].numel() for m in moves)


def owners(spec: TensorSpec, shard: int, layout: ParallelLayout, num_layers: int, num_experts: int) -> list[int]:
    """The ranks one shard of a parameter may come from: all that hold it, but of what is not cut over tensor
    ranks only the first tensor rank's copies."""
    stage = spec.pipeline_stage(layout, num_layers)
    tensor = shard if spec.dim is not None else 0
    if spec.expert is None:
        return [
            layout.rank(tensor=tensor, context=c, data=d, pipeline=stage)
            for d in range(layout.data)
            for c in range(layout.context)
        ]
    expert = spec.expert * layout.expert // num_experts
    return [
        layout.expert_rank(expert=expert, expert_tensor=tensor, expert_data=d, pipeline=stage)
        for d in range(layout.expert_data)
    ]


def plan_gather(
    specs: Sequence[TensorSpec],
    layout: ParallelLayout,
    *,
    num_layers: int,
    num_experts: int | None,
    destinations: Sequence[int],
    bucket_numel: int,
) -> GatherPlan:
    """Plan the gathering of every exported tensor at each destination rank.

    A bucket holds at most `bucket_numel` elements (or one tensor). A shard comes from the destination
    itself if it owns it, else from the owner that has sent least so far.
    """
    exported = [s for s in specs if not s.load_only]
    shapes = _shard_shapes(exported, layout)
    buckets: list[list[int]] = [[]]
    size = 0
    for i, spec in enumerate(exported):
        if buckets[-1] and size + spec.numel > bucket_numel:
            buckets.append([])
            size = 0
        buckets[-1].append(i)
        size += spec.numel

    sent: dict[int, int] = {}
    moves: list[tuple[Move, ...]] = []
    for bucket in buckets:
        in_bucket = []
        for i in bucket:
            spec = exported[i]
            for shard in range(spec.num_shards(layout)):
                holders = owners(spec, shard, layout, num_layers, num_experts or 1)
                for destination in destinations:
                    if destination in holders:
                        source = destination
                    else:
                        source = min(holders, key=lambda rank: (sent.get(rank, 0), rank))
                        sent[source] = sent.get(source, 0) + shapes[i].numel()
                    in_bucket.append(Move(i, shard, source, destination))
        moves.append(tuple(in_bucket))
    return GatherPlan(tuple(exported), layout, shapes, tuple(tuple(b) for b in buckets), tuple(moves))


def _shard_shapes(specs: Sequence[TensorSpec], layout: ParallelLayout) -> tuple[torch.Size, ...]:
    """Shapes of the parameters on a rank, from shards cut out of empty HF tensors."""
    known: dict[tuple[object, ...], torch.Size] = {}  # thousands of specs, a dozen shapes
    shapes = []
    for spec in specs:
        count = spec.num_shards(layout)
        key = (spec.hf_shapes, spec.codec, spec.dim, count)
        if key not in known:
            whole = spec.codec.to_megatron([torch.empty(shape, device="meta") for shape in spec.hf_shapes])
            known[key] = whole.shape if spec.dim is None else spec.codec.shard(whole, spec.dim, 0, count).shape
        shapes.append(known[key])
    return tuple(shapes)


@dataclass
class GatherCounters:
    """Bytes this rank moved: they prove that only destinations receive the model."""

    sent_bytes: int = 0
    received_bytes: int = 0


def gather_buckets(
    plan: GatherPlan, local: Mapping[str, Tensor], groups: ProcessGroups, counters: GatherCounters
) -> Iterator[list[NamedTensor]]:
    """Execute the plan. Collective over all ranks; yields one list per bucket, empty except at destinations.

    `local` maps Megatron names with global layer and expert numbers to this rank's shards.
    """
    dtypes = {t.dtype for t in local.values()}
    assert len(dtypes) == 1, f"parameters of several dtypes: {dtypes}"
    dtype = dtypes.pop()
    device = next(iter(local.values())).device
    for bucket, moves in zip(plan.buckets, plan.moves, strict=True):
        received = _exchange(plan, moves, local, groups.rank, dtype, device, counters)
        if not any(m.destination == groups.rank for m in moves):
            yield []
            continue
        tensors = []
        for i in bucket:
            spec = plan.specs[i]
            shards = [received[i, shard] for shard in range(spec.num_shards(plan.layout))]
            # A vocabulary cut over one rank may still be padded, so unshard always runs where there is an axis.
            whole = shards[0] if spec.dim is None else spec.codec.unshard(shards, spec.dim)
            tensors += [NamedTensor(name, t) for name, t in zip(spec.hf, spec.codec.to_hf(whole), strict=True)]
        yield tensors


def _exchange(
    plan: GatherPlan,
    moves: Sequence[Move],
    local: Mapping[str, Tensor],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    counters: GatherCounters,
) -> dict[tuple[int, int], Tensor]:
    """One flat message per (source, destination) pair; returns the shards that end here."""
    here: dict[tuple[int, int], Tensor] = {}
    outgoing: dict[int, list[Move]] = {}
    incoming: dict[int, list[Move]] = {}
    for move in moves:
        if move.source == rank == move.destination:
            here[move.spec, move.shard] = local[plan.specs[move.spec].megatron]
        elif move.source == rank:
            outgoing.setdefault(move.destination, []).append(move)
        elif move.destination == rank:
            incoming.setdefault(move.source, []).append(move)

    operations = []
    for destination, batch in sorted(outgoing.items()):
        flat = torch.cat([local[plan.specs[m.spec].megatron].reshape(-1) for m in batch])
        counters.sent_bytes += flat.numel() * flat.element_size()
        operations.append(dist.P2POp(dist.isend, flat, destination))
    arrivals = []
    for source, batch in sorted(incoming.items()):
        shapes = [plan.shard_shapes[m.spec] for m in batch]
        flat = torch.empty(sum(s.numel() for s in shapes), dtype=dtype, device=device)
        counters.received_bytes += flat.numel() * flat.element_size()
        operations.append(dist.P2POp(dist.irecv, flat, source))
        arrivals.append((batch, shapes, flat))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for batch, shapes, flat in arrivals:
        pieces = flat.split([s.numel() for s in shapes])
        for move, shape, piece in zip(batch, shapes, pieces, strict=True):
            here[move.spec, move.shard] = piece.view(shape)
    return here
