"""From the sequences each head generated to the micro-batches of every rank.

Heads exchange sequences so that each holds what the packing plan gives its replica, then broadcast them
to their tensor-, context- and pipeline-parallel peers. No rank ever holds the whole rollout batch.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.data.micro_batch import pack
from gspo_megatron.data.packing import plan_packing
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.types import RouteShape, Sequence, StepBatch

HEADER = 3  # numbers in front of each sequence: index, length, 1 if its advantages are per token


def distribute(
    sequences: SequenceOf[Sequence],
    groups: ProcessGroups,
    *,
    mini_batches: int,
    token_budget: int,
    pad_token_id: int,
    device: torch.device,
    routes: RouteShape | None = None,
) -> list[StepBatch]:
    """One StepBatch per mini-batch on this rank. Collective over all ranks.

    `sequences` are this replica's own, given at its head, empty elsewhere. Indices over all heads are
    0 … N-1; mini-batch j holds the j-th of `mini_batches` equal runs of them, so it is the same set of
    sequences in every layout. With `routes`, the same on all ranks but for its layers, micro-batches carry the routes
    that sequences have.
    """
    lengths, num_response_tokens = _all_lengths(sequences, groups, device)
    size, rest = divmod(len(lengths), mini_batches)
    assert rest == 0, f"{len(lengths)} sequences do not split into {mini_batches} mini-batches"
    layout = groups.layout
    plans = [
        plan_packing(
            lengths[j * size : (j + 1) * size],
            data_parallel=layout.data,
            token_budget=token_budget,
            # The interleaved schedule takes micro-batches in rounds of as many as there are stages.
            multiple_of=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        )
        for j in range(mini_batches)
    ]
    home = {
        j * size + i: replica
        for j, plan in enumerate(plans)
        for replica, micro_batches in enumerate(plan.assignment)
        for micro in micro_batches
        for i in micro
    }
    outgoing: list[list[Sequence]] = [[] for _ in range(layout.data)]
    for sequence in sequences:
        outgoing[home[sequence.index]].append(sequence)
    arrived = _exchange(outgoing, groups, device)
    if routes is not None:
        arrived = _exchange_routes(outgoing, arrived, routes, groups, device)
    mine = {s.index: s for s in arrived}

    batches = []
    for j, plan in enumerate(plans):
        micro_batches = [
            pack(
                [mine[j * size + i] for i in micro],
                pad_token_id=pad_token_id,
                device=device,
                tensor_parallel=layout.tensor,
                context_parallel=layout.context,
                context_rank=groups.coordinates.context,
                tensor_rank=groups.coordinates.tensor,
                routes=routes,
            )
            for micro in plan.assignment[groups.coordinates.data]
        ]
        num_tokens = sum(num_response_tokens[j * size : (j + 1) * size])
        batches.append(StepBatch(micro_batches, num_global_sequences=size, num_global_tokens=num_tokens))
    return batches


def _all_lengths(
    sequences: SequenceOf[Sequence], groups: ProcessGroups, device: torch.device
) -> tuple[list[int], list[int]]:
    """Length of every sequence of the rollout batch and how many of its tokens train, by index, on every rank."""
    # Nothing predicts a sequence's first token: it trains nothing, whatever the mask says.
    rows = [[s.index, s.token_ids.numel(), int(s.response_mask[1:].sum())] for s in sequences]
    local = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 3)
    gathered = [_broadcast(local, groups, source) for source in range(groups.layout.data)]
    counts = {i: (length, tokens) for part in gathered for i, length, tokens in part.tolist()}
    assert sorted(counts) == list(range(len(counts))), "indices of sequences are not 0 … N-1"
    return [counts[i][0] for i in range(len(counts))], [counts[i][1] for i in range(len(counts))]


def _broadcast(data: Tensor, groups: ProcessGroups, replica: int) -> Tensor:
    """A head's 2-D integer tensor on every rank of the job."""
    source = groups.layout.head_rank(replica)
    rows = torch.tensor([data.shape[0]], device=data.device)
    dist.broadcast(rows, source, group=groups.world)
    if groups.rank != source:
        data = data.new_empty(int(rows), data.shape[1])
    dist.broadcast(data, source, group=groups.world)
    return data


def _exchange(outgoing: list[list[Sequence]], groups: ProcessGroups, device: torch.device) -> list[Sequence]:
    """Send sequences to the replicas they belong to; returns this replica's, on all its ranks."""
    return _decode(_move([_encode(sequences) for sequences in outgoing], groups, device))


def _move(parts: list[Tensor], groups: ProcessGroups, device: torch.device) -> Tensor:
    """Send the heads' flat `parts`, one for each replica, there; returns what this replica got, on all its ranks' CPUs.

    What arrives is in the order of the senders. Collective over all ranks.
    """
    flat = torch.empty(0, dtype=parts[0].dtype, device=device)
    if groups.is_head:  # the heads form one data-parallel group
        flat = torch.cat(parts).to(device)
        if groups.layout.data > 1:
            sent = torch.tensor([p.numel() for p in parts], device=device)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=groups.dp)
            arrived = flat.new_empty(int(received.sum()))
            dist.all_to_all_single(arrived, flat, received.tolist(), sent.tolist(), group=groups.dp)
            flat = arrived
    if len(dist.get_process_group_ranks(groups.replica)) > 1:
        size = torch.tensor([flat.numel()], device=device)
        dist.broadcast(size, groups.head_rank, group=groups.replica)
        if not groups.is_head:
            flat = flat.new_empty(int(size))
        dist.broadcast(flat, groups.head_rank, group=groups.replica)
    return flat.cpu()


def _exchange_routes(
    outgoing: list[list[Sequence]],
    arrived: list[Sequence],
    shape: RouteShape,
    groups: ProcessGroups,
    device: torch.device,
) -> list[Sequence]:
    """The sequences that arrived, with their routes in this rank's layers.

    Layer by layer, so that a device never holds more of them; as bytes, since NCCL knows no int16.
    """

    def moved(of: Callable[[Sequence], Tensor]) -> Tensor:
        nothing = torch.empty(0, dtype=torch.uint8)
        parts = [torch.cat([nothing, *(of(s).contiguous().view(torch.uint8).flatten() for s in to)]) for to in outgoing]
        return _move(parts, groups, device)

    def valid(s: Sequence) -> Tensor:
        return torch.zeros(s.token_ids.numel() - 1, dtype=torch.bool) if s.routes_valid is None else s.routes_valid

    def experts(s: Sequence, layer: int) -> Tensor:
        if s.routes is None:
            return torch.zeros(s.token_ids.numel() - 1, shape.experts_per_token, dtype=torch.int16)
        assert s.routes.shape[1:] == (shape.num_layers, shape.experts_per_token), (s.routes.shape, shape)
        return s.routes[:, layer]

    rows = [s.token_ids.numel() - 1 for s in arrived]
    all_valid = moved(valid).view(torch.bool)
    kept = []
    for layer in range(shape.num_layers):
        of_layer = moved(partial(experts, layer=layer))
        if layer in shape.layers:
            kept.append(of_layer.view(torch.int16).reshape(-1, shape.experts_per_token))
    none = torch.empty(sum(rows), 0, shape.experts_per_token, dtype=torch.int16)
    whole = torch.stack(kept, 1) if kept else none
    pairs = zip(arrived, whole.split(rows), all_valid.split(rows), strict=True)
    return [replace(s, routes=own, routes_valid=is_valid) for s, own, is_valid in pairs]


def _encode(sequences: SequenceOf[Sequence]) -> Tensor:
    """Flat float64, exact for token ids below 2^53 and for float32 values."""
    parts = []
    for s in sequences:
        header = torch.tensor([s.index, s.token_ids.numel(), s.advantages.dim()])
        parts += [header, s.token_ids, s.response_mask, s.rollout_logprobs, s.advantages.reshape(-1)]
    return torch.cat([p.to("cpu", torch.float64) for p in parts]) if parts else torch.empty(0, dtype=torch.float64)


def _decode(flat: Tensor) -> list[Sequence]:
    sequences, at = [], 0

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return flat[at - count : at]

    while at < flat.numel():
        index, length, dims = (int(x) for x in take(HEADER))
        token_ids, mask, logprobs = take(length).long(), take(length).bool(), take(length).float()
        advantages = take(length).float() if dims else take(1).float().reshape(())
        sequences.append(Sequence(index, token_ids, mask, logprobs, advantages))
    return sequences
