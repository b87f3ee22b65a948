"""What a plan costs: bytes by sender and by link, memory, and predicted seconds.

The model of time is simple, and its result a prediction:

- A server takes one bucket at a time over all its ranks, and all servers take the same one: steps follow each other.
- A broadcast leaves the sender by its NIC, enters each node of servers by one NIC and goes on over NVLink and to the
  next node in a pipeline: its bytes move once, at the slower of the sender's NIC and the servers'.
- A server then spends a fixed time on the call and on each tensor, measured on a real one (layouts.json, "call").
- The shards of a step are gathered while the step before it is sent: over NVLink within a node, else over NICs, all
  ranks at the same time. Of a step's sending and the next one's gathering, the longer counts.

Left out: the latency of the network, contention with other jobs, how far NCCL stays below the links' rates, the copies
within a GPU, pausing and resuming the servers.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from gspo_megatron.weights.reshard import ReshardPlan, Step
from reshard.cells import Call, Cell, Links, Model, make_plan

FEED = 0  # the only one: all servers


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    planning_s: float  # CPU time
    num_buckets: int
    num_senders: int  # each has a communicator with all servers
    imbalance: float  # most bytes of a sender over the mean, in the worst pipeline stage
    model_bytes: int
    gathered_bytes: int  # that reach senders from other ranks
    relayed_bytes: int  # of experts whose sender does not hold them
    peak_buckets: float  # most memory of a rank on top of its parameters
    nic_sent_bytes: int  # at most, by a trainer's NIC: broadcasts and shards
    nic_received_bytes: int  # at most, by a trainer's NIC
    server_nic_received_bytes: int  # at most: one NIC of a node takes the broadcasts for its ranks
    received_over_model: float  # bytes of a server rank over the model's
    received_over_shard: float  # over its part of the model under the server's tensor parallelism
    sending_s: float
    calls_s: float
    waiting_s: float  # for shards that are not gathered in time

    @property
    def seconds(self) -> float:
        return self.sending_s + self.calls_s + self.waiting_s


def measure(model: Model, cell: Cell, bucket_bytes: int, links: Links, call: Call) -> Figures:
    """Plan a cell and count."""
    start = time.process_time()
    plan = make_plan(model, cell, bucket_bytes)
    planning_s = time.process_time() - start
    sending_s, calls_s, waiting_s = predict(plan, links, call)
    sent_nic, received_nic = nic_bytes(plan, links)
    received = sum(b.nbytes for step in plan.steps for b in step.buckets)
    senders = plan.senders(FEED)
    return Figures(
        planning_s=planning_s,
        num_buckets=sum(len(step.buckets) for step in plan.steps),
        num_senders=len(senders),
        imbalance=max(stage_imbalance(plan).values()),
        model_bytes=plan.num_bytes,
        gathered_bytes=sum(plan.gathered_bytes(rank) for rank in senders),
        relayed_bytes=plan.relayed_bytes(FEED),
        peak_buckets=max(plan.peak_bytes(rank) for rank in busy_ranks(plan)) / plan.bucket_bytes,
        nic_sent_bytes=max(sent_nic.values()),
        nic_received_bytes=max(received_nic.values(), default=0),
        server_nic_received_bytes=received,
        received_over_model=received / plan.num_bytes,
        received_over_shard=received / (plan.num_bytes / cell.servers.tensor),
        sending_s=sending_s,
        calls_s=calls_s,
        waiting_s=waiting_s,
    )


def stage_imbalance(plan: ReshardPlan) -> dict[int, float]:
    """By pipeline stage: the most bytes that one of its senders sends, over their mean."""
    by_stage: dict[int, list[int]] = {}
    for rank, sent in plan.sent_bytes(FEED).items():
        by_stage.setdefault(plan.layout.coordinates(rank).pipeline, []).append(sent)
    return {stage: max(sent) * len(sent) / sum(sent) for stage, sent in by_stage.items()}


def busy_ranks(plan: ReshardPlan) -> set[int]:
    """Ranks that send, give or gather anything; the others need no memory."""
    moving = {rank for step in plan.steps for m in step.moves for rank in (m.source, m.destination)}
    return moving | set(plan.senders(FEED))


def nic_bytes(plan: ReshardPlan, links: Links) -> tuple[Counter[int], Counter[int]]:
    """By NIC of the trainers: bytes it sends, to servers and to other nodes of trainers, and bytes it receives."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for rank, nbytes in plan.sent_bytes(FEED).items():
        sent[links.nic(rank)] += nbytes
    for step in plan.steps:
        for move in step.moves:
            if links.node(move.source) != links.node(move.destination):
                sent[links.nic(move.source)] += plan.shard_bytes(move.spec)
                received[links.nic(move.destination)] += plan.shard_bytes(move.spec)
    return sent, received


def predict(plan: ReshardPlan, links: Links, call: Call) -> tuple[float, float, float]:
    """Seconds that servers receive, spend on calls, and wait for shards to be gathered."""
    rate = min(links.trainer_nic_gb_per_s, links.server_nic_gb_per_s) * 1e9
    sending_s = calls_s = 0.0
    waiting_s = gather_s(plan, plan.steps[0], links)
    for step, following in zip(plan.steps, [*plan.steps[1:], None], strict=True):
        sent_s = sum(b.nbytes for b in step.buckets) / rate
        tensors = sum(len(plan.specs[i].hf) for b in step.buckets for i in b.specs)
        called_s = call.seconds_per_call + tensors * call.seconds_per_tensor
        sending_s, calls_s = sending_s + sent_s, calls_s + called_s
        if following is not None:
            waiting_s += max(0.0, gather_s(plan, following, links) - sent_s - called_s)
    return sending_s, calls_s, waiting_s


def gather_s(plan: ReshardPlan, step: Step, links: Links) -> float:
    """Seconds until a step's sender has its shards: those of the busiest rank or NIC, in one direction."""
    nvlink: Counter[tuple[str, int]] = Counter()
    network: Counter[tuple[str, int]] = Counter()
    for move in step.moves:
        size = plan.shard_bytes(move.spec)
        if links.node(move.source) != links.node(move.destination):
            network["out", links.nic(move.source)] += size
            network["in", links.nic(move.destination)] += size
        elif move.source != move.destination:
            nvlink["out", move.source] += size
            nvlink["in", move.destination] += size
    over_nvlink = max(nvlink.values(), default=0) / (links.nvlink_gb_per_s * 1e9)
    return max(over_nvlink, max(network.values(), default=0) / (links.trainer_nic_gb_per_s * 1e9))
