"""From the Megatron layout to the engines: who sends which tensor in which bucket. Pure data, alike on every rank.

An engine, or a set of engines that are reached together, is fed by a set of ranks: the feed. Every feed gets every
HF tensor once, whole, from one of its ranks, the tensor's sender. A broadcast to SGLang servers is one feed of all
ranks; an engine in a rank's own process is a feed of that rank alone.

In a feed of all ranks each pipeline stage sends its own layers. Its senders are the ranks of one copy of the stage
(as many as the larger of the expert- and tensor-parallel degrees), so every expert is sent by a rank that has it. Two
things are moved to another sender of the stage: experts of ranks that are no senders, because each sender needs a
communicator with the servers and `max_senders` bounds their number; and a few experts of a rank that had more than
`BALANCE` × the stage's mean, because it also sends an embedding.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.rules import TensorSpec

BALANCE = 1.1  # bytes of a sender over the mean of its pipeline stage, from which experts are moved
MAX_SENDERS = 64


@dataclass(frozen=True)
class Move:
    """One shard of one parameter, from its owner to the tensor's sender."""

    spec: int  # index into ReshardPlan.specs
    shard: int
    source: int  # global rank
    destination: int  # the sender; equal to source where it holds the shard itself


@dataclass(frozen=True)
class Bucket:
    """Tensors that one rank sends together."""

    feed: int
    sender: int  # global rank
    specs: tuple[int, ...]  # indices into ReshardPlan.specs, in the model's order
    nbytes: int  # as sent


@dataclass(frozen=True)
class Step:
    """What happens at one time: at most one bucket a feed."""

    buckets: tuple[Bucket, ...]
    moves: tuple[Move, ...]

    def bucket_of(self, rank: int) -> Bucket | None:
        """The bucket that a rank sends."""
        return next((b for b in self.buckets if b.sender == rank), None)


@dataclass(frozen=True)
class ReshardPlan:
    """Who sends what, and who gives the senders what they lack."""

    specs: tuple[TensorSpec, ...]
    layout: ParallelLayout
    dtype: torch.dtype  # of the tensors as sent, but of those whose spec names another
    shard_shapes: tuple[torch.Size, ...]  # of each spec's shards, which are all alike
    feeds: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    bucket_bytes: int  # largest bucket: what was asked for, or the largest tensor
    relayed: tuple[
        frozenset[int], ...
    ]  # by feed: specs of experts that no sender holds, or that were moved for balance

    @property
    def num_bytes(self) -> int:
        """The model as sent to one feed."""
        return sum(self.spec_bytes(i) for i in range(len(self.specs)))

    def dtype_of(self, index: int) -> torch.dtype:
        """Dtype of a spec's tensors as sent."""
        return self.specs[index].dtype or self.dtype

    def spec_bytes(self, index: int) -> int:
        """The HF tensors of one spec as sent."""
        return self.specs[index].numel * self.dtype_of(index).itemsize

    def shard_bytes(self, index: int) -> int:
        """One shard on the way to its sender; padding rows of the vocabulary included."""
        return self.shard_shapes[index].numel() * self.dtype_of(index).itemsize

    def senders(self, feed: int) -> tuple[int, ...]:
        """The ranks that send to a feed; each needs its own communicator with the servers."""
        return tuple(sorted(self.sent_bytes(feed)))

    def sent_bytes(self, feed: int) -> dict[int, int]:
        """Bytes that each sender of a feed sends."""
        sent: dict[int, int] = {}
        for step in self.steps:
            for bucket in step.buckets:
                if bucket.feed == feed:
                    sent[bucket.sender] = sent.get(bucket.sender, 0) + bucket.nbytes
        return sent

    def relayed_bytes(self, feed: int) -> int:
        """Bytes of experts whose sender is not the rank that has them."""
        return sum(self.spec_bytes(i) for i in self.relayed[feed])

    @functools.cached_property
    def _traffic(self) -> dict[int, tuple[int, int]]:
        """Rank → bytes it gives to senders, bytes it gets as a sender."""
        given: dict[int, int] = {}
        got: dict[int, int] = {}
        for step in self.steps:
            for move in step.moves:
                if move.source != move.destination:
                    size = self.shard_bytes(move.spec)
                    given[move.source] = given.get(move.source, 0) + size
                    got[move.destination] = got.get(move.destination, 0) + size
        return {r: (given.get(r, 0), got.get(r, 0)) for r in given.keys() | got.keys()}

    def given_bytes(self, rank: int) -> int:
        """Bytes of shards that leave a rank for other senders."""
        return self._traffic.get(rank, (0, 0))[0]

    def gathered_bytes(self, rank: int) -> int:
        """Bytes of shards that reach a rank from others."""
        return self._traffic.get(rank, (0, 0))[1]

    def buffers(self, rank: int) -> tuple[int, int]:
        """How many buffers a rank puts its buckets together in by turns, and the bytes of each.

        As many as fit into the memory of two buckets beside what is moved meanwhile. With two, one is filled while the
        other is on its way; with one, when it has left; with none, each bucket gets memory of its own then.
        """
        needs = self._needs.get(rank, _Needs())
        room = 2 * self.bucket_bytes - needs.moved
        return next((n for n in (2, 1) if n <= needs.buckets and n * needs.largest <= room), 0), needs.largest

    def peak_bytes(self, rank: int) -> int:
        """Most memory that a rank needs on top of its parameters: its buffers, and the shards that it gives and gets in
        a step while one of them is on its way."""
        count, size = self.buffers(rank)
        needs = self._needs.get(rank, _Needs())
        return count * size + needs.moved if count else needs.without_buffers

    @functools.cached_property
    def _needs(self) -> dict[int, _Needs]:
        """Of the ranks that send, give or receive anything."""
        needs: dict[int, _Needs] = {}
        in_flight: Counter[int] = Counter()
        for step in self.steps:
            moved: Counter[int] = Counter()
            received: Counter[int] = Counter()
            for move in step.moves:
                if move.source != move.destination:
                    size = self.shard_bytes(move.spec)
                    moved[move.source] += size
                    moved[move.destination] += size
                    received[move.destination] += size
            for rank, size in moved.items():
                one = needs.setdefault(rank, _Needs())
                one.moved = max(one.moved, size)
                one.without_buffers = max(one.without_buffers, in_flight[rank] + size)
            for bucket in step.buckets:
                one = needs.setdefault(bucket.sender, _Needs())
                one.largest, one.buckets = max(one.largest, bucket.nbytes), one.buckets + 1
                one.without_buffers = max(one.without_buffers, received[bucket.sender] + bucket.nbytes)
                in_flight[bucket.sender] = bucket.nbytes
        return needs


@dataclass
class _Needs:
    """Bytes that carrying out a plan takes on one rank."""

    largest: int = 0  # bucket that it sends
    buckets: int = 0  # their number
    moved: int = 0  # shards that it gives and receives in one step, at most
    without_buffers: int = 0  # at most, where each bucket's memory is returned when the next one's shards are there


@functools.cache
def _owners(layout: ParallelLayout, stage: int, expert: int | None, tensor: int) -> tuple[int, ...]:
    """The ranks that a shard may come from: all that hold it.

    Args:
        expert: expert-parallel rank that has it; None: it is not an expert's.
        tensor: tensor-parallel rank, of experts the expert-tensor-parallel one; 0 for what is not cut, which is taken
            from the first rank's copies alone.
    """
    if expert is None:
        return tuple(
            layout.rank(tensor=tensor, context=c, data=d, pipeline=stage)
            for d in range(layout.data)
            for c in range(layout.context)
        )
    return tuple(
        layout.expert_rank(expert=expert, expert_tensor=tensor, expert_data=d, pipeline=stage)
        for d in range(layout.expert_data)
    )


def plan_reshard(
    specs: Sequence[TensorSpec],
    layout: ParallelLayout,
    *,
    num_layers: int,
    num_experts: int | None,
    feeds: Sequence[Sequence[int]],
    dtype: torch.dtype,
    bucket_bytes: int,
    max_senders: int = MAX_SENDERS,
) -> ReshardPlan:
    """Plan the way of every exported tensor to every feed.

    Args:
        specs: the model's parameters.
        layout: of the ranks that train.
        num_layers, num_experts: of the model; None without experts.
        feeds: for each engine, or set of engines reached by the same broadcast, the ranks that may send to it.
        dtype: of the tensors as sent, but of those whose spec names another.
        bucket_bytes: of a bucket at most; a larger tensor is sent alone. A rank needs two buckets of memory at most,
            and one more for each further feed, to whose senders it may give shards in the same step.
        max_senders: of a feed, in all pipeline stages together; at least the pipeline degree.

    A shard comes from the sender itself if it holds it, else from the owner that has given least so far.
    """
    exported = tuple(s for s in specs if not s.load_only)
    shapes = shard_shapes(exported, layout)
    dtypes = [s.dtype or dtype for s in exported]
    sizes = [s.numel * d.itemsize for s, d in zip(exported, dtypes, strict=True)]
    stages = [s.pipeline_stage(layout, num_layers) for s in exported]
    holder = [None if s.expert is None else s.expert * layout.expert // (num_experts or 1) for s in exported]

    queues: list[list[Bucket]] = []
    relayed = []
    for number, feed in enumerate(feeds):
        sender_of: list[int] = [-1] * len(exported)
        moved: set[int] = set()
        loads = dict.fromkeys(feed, 0)
        for stage in range(layout.pipeline):
            here = [i for i in range(len(exported)) if stages[i] == stage]
            senders = _senders(layout, stage, feed, max(1, max_senders // layout.pipeline))
            moved |= _assign(here, sizes, holder, senders, layout, loads, sender_of)
        queues.append(_queue(number, sender_of, sizes, bucket_bytes, dtypes))
        relayed.append(frozenset(moved))

    steps = _steps(queues, exported, layout, stages, holder, shapes)
    largest = max(bucket_bytes, max(sizes, default=0))
    return ReshardPlan(
        exported, layout, dtype, shapes, tuple(tuple(f) for f in feeds), tuple(steps), largest, tuple(relayed)
    )


def _steps(
    queues: Sequence[Sequence[Bucket]],
    specs: Sequence[TensorSpec],
    layout: ParallelLayout,
    stages: Sequence[int],
    holder: Sequence[int | None],
    shapes: Sequence[torch.Size],
) -> list[Step]:
    """Each feed's next bucket at the same time, and where their shards come from."""
    given: dict[int, int] = {}
    steps = []
    for i in range(max(map(len, queues), default=0)):
        buckets = tuple(queue[i] for queue in queues if i < len(queue))
        moves = []
        for bucket in buckets:
            for index in bucket.specs:
                spec = specs[index]
                for shard in range(spec.num_shards(layout)):
                    expert, tensor = holder[index], shard if spec.dim is not None else 0
                    if spec.stacks_experts:  # each shard is all that one expert-parallel rank has
                        expert, tensor = shard, 0
                    owners = _owners(layout, stages[index], expert, tensor)
                    if bucket.sender in owners:
                        source = bucket.sender
                    else:
                        source = min(owners, key=lambda rank: (given.get(rank, 0), rank))
                        given[source] = given.get(source, 0) + shapes[index].numel()
                    moves.append(Move(index, shard, source, bucket.sender))
        steps.append(Step(buckets, tuple(moves)))
    return steps


def _senders(layout: ParallelLayout, stage: int, feed: Sequence[int], most: int) -> list[int]:
    """The ranks of a feed that send a stage's tensors: those of one copy of the stage, or of the whole feed if it has
    none in this stage. The first of them differ in the experts they hold."""
    places = {rank: layout.coordinates(rank) for rank in feed}
    of_stage = [rank for rank in feed if places[rank].pipeline == stage]
    if not of_stage:
        return sorted(feed)[:most]
    ordered = sorted(of_stage, key=lambda r: (places[r].expert_data, places[r].expert_tensor, places[r].expert))
    return ordered[: min(most, max(layout.expert, layout.tensor))]


def _assign(
    specs: Sequence[int],
    sizes: Sequence[int],
    holder: Sequence[int | None],
    senders: Sequence[int],
    layout: ParallelLayout,
    loads: dict[int, int],
    sender_of: list[int],
) -> set[int]:
    """Give each spec of a stage its sender: the least loaded, and for experts one that holds them if there is one.

    Fills `sender_of` and `loads`; returns the experts that are sent by a rank that doesn't hold them.
    """
    by_expert: dict[int, list[int]] = {}
    for rank in senders:
        by_expert.setdefault(layout.coordinates(rank).expert, []).append(rank)
    moved: set[int] = set()
    # Large tensors first, and what may go anywhere before what may not.
    for i in sorted(specs, key=lambda i: (holder[i] is not None, -sizes[i], i)):
        expert = holder[i]
        candidates = senders if expert is None else by_expert.get(expert, senders)
        if expert is not None and expert not in by_expert:
            moved.add(i)
        sender_of[i] = min(candidates, key=lambda rank: (loads[rank], rank))
        loads[sender_of[i]] += sizes[i]
    return moved | _balance(specs, sizes, holder, senders, loads, sender_of)


def _balance(
    specs: Sequence[int],
    sizes: Sequence[int],
    holder: Sequence[int | None],
    senders: Sequence[int],
    loads: dict[int, int],
    sender_of: list[int],
) -> set[int]:
    """Move experts away from a sender with more than BALANCE × the mean, to the least loaded one."""
    mean = sum(loads[r] for r in senders) / len(senders)
    moved: set[int] = set()
    experts: dict[int, list[int]] = {rank: [] for rank in senders}
    for i in specs:
        if holder[i] is not None:
            experts[sender_of[i]].append(i)
    while True:
        most, least = max(senders, key=lambda r: loads[r]), min(senders, key=lambda r: loads[r])
        if loads[most] <= BALANCE * mean or not experts[most]:
            return moved
        i = experts[most].pop()
        if loads[least] + sizes[i] >= loads[most]:
            return moved
        loads[most] -= sizes[i]
        loads[least] += sizes[i]
        sender_of[i] = least
        experts[least].append(i)
        moved.add(i)


def _queue(
    feed: int, sender_of: Sequence[int], sizes: Sequence[int], bucket_bytes: int, dtypes: Sequence[torch.dtype]
) -> list[Bucket]:
    """A feed's buckets: each sender's tensors in the model's order, the senders in turn, so that one sends while the
    next ones gather. A bucket is of one dtype."""
    of_sender: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for i in sorted(range(len(sender_of)), key=lambda i: str(dtypes[i])):
        sender = sender_of[i]
        buckets = of_sender.setdefault(sender, [])
        is_full = not buckets or filled[sender] + sizes[i] > bucket_bytes
        if is_full or dtypes[buckets[-1][-1]] != dtypes[i]:
            buckets.append([])
            filled[sender] = 0
        buckets[-1].append(i)
        filled[sender] += sizes[i]
    queue = []
    for turn in range(max((len(b) for b in of_sender.values()), default=0)):
        for sender in sorted(of_sender):
            if turn < len(of_sender[sender]):
                chosen = of_sender[sender][turn]
                queue.append(Bucket(feed, sender, tuple(chosen), sum(sizes[i] for i in chosen)))
    return queue


def shard_shapes(specs: Iterable[TensorSpec], layout: ParallelLayout) -> tuple[torch.Size, ...]:
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
