"""Carrying out a reshard plan on the training ranks: shards to the senders, there put together to HF tensors.

Each shard goes straight from one owner to its tensor's sender; other ranks never hold more than their own shards.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.reshard import Bucket, Move, ReshardPlan

_KEPT_BY_MALLOC = 32 * 2**20  # bytes of a block up to which glibc does not return it to the kernel at once


@dataclass
class GatherCounters:
    """Bytes this rank moved: they prove that only senders receive the model."""

    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True)
class FlatBucket:
    """HF-named tensors in one flat buffer, one after the other."""

    flat: Tensor  # [bytes] uint8
    tensors: list[NamedTensor]  # views into it


@dataclass(frozen=True)
class GatheredBucket:
    """What one step of the plan brought to this rank, as shards or put together; see `gather_buckets`."""

    number: int  # of the step
    count: int  # of steps in the plan
    bucket: Bucket | None  # None: this rank sends nothing in this step
    plan: ReshardPlan
    shards: dict[tuple[int, int], Tensor] = field(repr=False)  # (spec, shard) of the bucket
    buffer: Tensor | None = field(default=None, repr=False)  # [at least the bucket's bytes] uint8; None: a new one
    _assembled: list[FlatBucket] = field(default_factory=list, repr=False)

    def assemble(self) -> FlatBucket:
        """The bucket as it is sent. The shards that came from other ranks are let go."""
        if not self._assembled:
            self._assembled.append(self._assemble())
        return self._assembled[0]

    @torch.no_grad()
    def _assemble(self) -> FlatBucket:
        assert self.bucket is not None, "this rank sends nothing in this step"
        plan, buffer = self.plan, self.buffer
        if buffer is None:
            buffer = torch.empty(self.bucket.nbytes, dtype=torch.uint8, device=next(iter(self.shards.values())).device)
        flat = buffer[: self.bucket.nbytes]
        tensors: list[NamedTensor] = []
        offset = 0
        for i in self.bucket.specs:
            spec, dtype = plan.specs[i], plan.dtype_of(i)  # the same of all in a bucket: they stay aligned
            views = []
            for shape in spec.hf_shapes:
                size = torch.Size(shape).numel() * dtype.itemsize
                views.append(flat[offset : offset + size].view(dtype).view(shape))
                offset += size
            count = spec.num_shards(plan.layout)
            for shard in range(count):
                spec.codec.place(self.shards[i, shard], spec.dim, shard, count, views)
            tensors += [NamedTensor(name, view) for name, view in zip(spec.hf, views, strict=True)]
        self.shards.clear()
        return FlatBucket(flat, tensors)

    def __iter__(self) -> Iterator[NamedTensor]:
        """The assembled tensors; none where this rank sends nothing."""
        return iter([] if self.bucket is None else self.assemble().tensors)


def gather_buckets(
    plan: ReshardPlan, local: Mapping[str, Tensor], groups: ProcessGroups, counters: GatherCounters
) -> Iterator[GatheredBucket]:
    """Execute the plan. Collective over all ranks, which must ask for every step; yields one bucket a step.

    `local` maps Megatron names with global layer and expert numbers to this rank's shards.

    A rank's buckets share the buffers of `plan.buffers`, because fresh memory costs more than copying into it. With
    two, a bucket is put together here, while the one before it may still be on its way; else by its `assemble`, which
    must not be called before that one has left. When a step is asked for, all but the rank's last bucket have left.
    """
    device = next(iter(local.values())).device
    rank = groups.rank
    count, size = plan.buffers(rank)
    buffers: list[Tensor] = []
    sent = 0
    for number, step in enumerate(plan.steps):
        shards = _exchange(plan, step.moves, local, rank, device, counters)
        bucket, buffer = step.bucket_of(rank), None
        if bucket is not None and count > 0:
            if len(buffers) < count:
                buffers.append(_new_buffer(size, device))
            buffer = buffers[sent % count]
            sent += 1
        gathered = GatheredBucket(number, len(plan.steps), bucket, plan, shards, buffer)
        if bucket is not None and count > 1:
            gathered.assemble()
        yield gathered


def _new_buffer(nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8. Large ones in host memory are in huge pages where there are any: the kernel needs longer to clear
    and map small pages than it takes to copy the weights into them. Others malloc has from the update before."""
    if device.type != "cpu" or nbytes <= _KEPT_BY_MALLOC:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _exchange(
    plan: ReshardPlan,
    moves: Sequence[Move],
    local: Mapping[str, Tensor],
    rank: int,
    device: torch.device,
    counters: GatherCounters,
) -> dict[tuple[int, int], Tensor]:
    """One flat message per source, destination and dtype as sent; returns the shards that end here."""
    here: dict[tuple[int, int], Tensor] = {}
    outgoing: dict[tuple[int, str], list[Move]] = {}
    incoming: dict[tuple[int, str], list[Move]] = {}
    for move in moves:
        kind = str(plan.dtype_of(move.spec))
        if move.source == rank == move.destination:
            here[move.spec, move.shard] = local[plan.specs[move.spec].megatron]
        elif move.source == rank:
            outgoing.setdefault((move.destination, kind), []).append(move)
        elif move.destination == rank:
            incoming.setdefault((move.source, kind), []).append(move)

    operations = []
    for (destination, _), batch in sorted(outgoing.items()):
        dtype = plan.dtype_of(batch[0].spec)
        flat = torch.empty(sum(plan.shard_shapes[m.spec].numel() for m in batch), dtype=dtype, device=device)
        for move, piece in zip(batch, flat.split([plan.shard_shapes[m.spec].numel() for m in batch]), strict=True):
            shard = local[plan.specs[move.spec].megatron]
            piece.view(shard.shape).copy_(shard)
        counters.sent_bytes += flat.numel() * flat.element_size()
        operations.append(dist.P2POp(dist.isend, flat, destination))
    arrivals = []
    for (source, _), batch in sorted(incoming.items()):
        shapes = [plan.shard_shapes[m.spec] for m in batch]
        dtype = plan.dtype_of(batch[0].spec)
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
