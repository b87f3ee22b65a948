"""What an SGLang server makes of HF tensors: its fused, tensor-parallel parameters. Pure.

The trainer derives from this what each server rank must hold after an update, and compares it with what the server
says it holds. Layouts are those of SGLang's models (QKVParallelLinear, MergedColumnParallelLinear, FusedMoE,
VocabParallelEmbedding), for its unquantized weights that no kernel has packed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.reshard import Bucket, Move, ReshardPlan, Step
from gspo_megatron.weights.rules import TensorSpec

VOCABULARY_MULTIPLE = 64  # SGLang pads embedding and head to it

_EXPERT = re.compile(r"(?P<prefix>.+\.experts)\.\d+\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_DOWN = (".down_proj.weight", ".w2.weight")  # Mixtral's name, too
_FUSED = (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj"))  # first of the fused projections, the fused name
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class ServerLayout:
    """The ranks of one server."""

    tensor: int = 1
    expert: int = 1  # ranks the experts are spread over; divides `tensor`
    mlp_multiple: int = 1  # each rank's share of an MLP's intermediate size is padded to it: 32 on CPUs

    def __post_init__(self) -> None:
        if self.tensor % self.expert:
            raise UserError(
                f"a server with tp_size={self.tensor} and ep_size={self.expert}: ep_size must divide tp_size"
            )


@dataclass(frozen=True)
class ServerParameter:
    """One parameter of the served model and the specs it is made of, in the order of its rows (or experts)."""

    name: str
    specs: tuple[int, ...]  # indices into the list of exported specs


def server_parameters(specs: Sequence[TensorSpec]) -> list[ServerParameter]:
    """The served model's parameters, in the order in which they first appear. `specs`: the exported ones."""
    members: dict[str, list[int]] = {}
    for i, spec in enumerate(specs):
        members.setdefault(_server_name(spec), []).append(i)
    return [ServerParameter(name, tuple(found)) for name, found in members.items()]


def _server_name(spec: TensorSpec) -> str:
    first = spec.hf[0]
    match = _EXPERT.fullmatch(first)
    if match:
        return f"{match['prefix']}.{'w2' if first.endswith(_DOWN) else 'w13'}_weight"
    for separate, fused in _FUSED:
        if f".{separate}." in first:
            return first.replace(f".{separate}.", f".{fused}.")
    return first


def server_piece(
    spec: TensorSpec, tensors: Sequence[Tensor], layout: ServerLayout, rank: int, *, num_experts: int | None
) -> Tensor | None:
    """What one server rank holds of a spec's HF tensors, contiguous; None for an expert of another rank.

    A parameter on a rank is the pieces of its specs, one after the other.
    """
    name = spec.hf[0]
    if spec.expert is not None:
        assert num_experts is not None
        per_rank, cut = num_experts // layout.expert, layout.tensor // layout.expert
        if spec.expert // per_rank != rank // cut:
            return None
        return _cut(tensors, 1 if name.endswith(_DOWN) else 0, rank % cut, cut, layout.mlp_multiple)
    if name in _VOCABULARY:
        return _vocabulary_rows(tensors[0], rank, layout.tensor)
    if name.endswith(".o_proj.weight"):
        return _cut(tensors, 1, rank, layout.tensor, 1)
    if name.endswith(".down_proj.weight"):
        return _cut(tensors, 1, rank, layout.tensor, layout.mlp_multiple)
    if len(tensors) == 3:
        return _query_key_value(spec, tensors, rank, layout.tensor)
    if len(tensors) == 2:
        return _cut(tensors, 0, rank, layout.tensor, layout.mlp_multiple)
    return tensors[0].contiguous()  # norms and routers: whole on every rank


def _cut(tensors: Sequence[Tensor], dim: int, index: int, count: int, multiple: int) -> Tensor:
    """One of `count` equal shares of each tensor, stacked; shares are multiples of `multiple`, filled up with zeros."""
    shares = []
    for tensor in tensors:
        size = tensor.shape[dim]
        share = -(-size // (count * multiple)) * multiple
        start = min(index * share, size)
        piece = tensor.narrow(dim, start, min(share, size - start))
        if piece.shape[dim] < share:
            shape = list(tensor.shape)
            shape[dim] = share - piece.shape[dim]
            piece = torch.cat([piece, tensor.new_zeros(shape)], dim)
        shares.append(piece)
    return torch.cat(shares, 0).contiguous()


def _query_key_value(spec: TensorSpec, tensors: Sequence[Tensor], rank: int, count: int) -> Tensor:
    """Heads are cut over ranks; with more ranks than key heads, several ranks hold the same one."""
    query, key, value = tensors
    heads: int = spec.codec.num_query_groups  # type: ignore[attr-defined]
    index, pieces = (rank, count) if heads >= count else (rank * heads // count, heads)
    parts = [query.chunk(count)[rank], key.chunk(pieces)[index], value.chunk(pieces)[index]]
    return torch.cat(parts).contiguous()


def _vocabulary_rows(table: Tensor, rank: int, count: int) -> Tensor:
    rows = -(-table.shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // count
    piece = table[rank * rows : (rank + 1) * rows]
    if piece.shape[0] < rows:
        piece = torch.cat([piece, piece.new_zeros(rows - piece.shape[0], *piece.shape[1:])])
    return piece.contiguous()


def plan_check(plan: ReshardPlan, parameters: Sequence[ServerParameter]) -> ReshardPlan:
    """A plan that brings the specs of each parameter, in its order, to one rank that computes its checksums.

    All ranks take part, each with about as many bytes; a bucket holds specs of one parameter. Where the given plan
    brings a spec to its sender, this one brings it anew, from its owners: what was sent is not what is checked.

    One rank may own what all others check at the same time, so all buckets of a step together are no larger than one of
    the given plan (or one tensor): no rank needs more memory than for sending.
    """
    ranks = range(plan.layout.world_size)
    loads = dict.fromkeys(ranks, 0)
    queues: dict[int, list[Bucket]] = {rank: [] for rank in ranks}
    sizes = {p.name: sum(plan.spec_bytes(i) for i in p.specs) for p in parameters}
    share = plan.bucket_bytes // len(ranks)
    for parameter in sorted(parameters, key=lambda p: (-sizes[p.name], p.specs)):
        rank = min(ranks, key=lambda r: (loads[r], r))
        loads[rank] += sizes[parameter.name]
        chosen: list[int] = []
        for i in parameter.specs:
            if chosen and sum(map(plan.spec_bytes, chosen)) + plan.spec_bytes(i) > share:
                queues[rank].append(Bucket(rank, rank, tuple(chosen), sum(map(plan.spec_bytes, chosen))))
                chosen = []
            chosen.append(i)
        queues[rank].append(Bucket(rank, rank, tuple(chosen), sum(map(plan.spec_bytes, chosen))))
    sources = {(m.spec, m.shard): m.source for step in plan.steps for m in step.moves}
    steps = []
    for turn in range(max(map(len, queues.values()))):
        together: list[Bucket] = []
        for bucket in (queue[turn] for queue in queues.values() if turn < len(queue)):
            if together and sum(b.nbytes for b in together) + bucket.nbytes > plan.bucket_bytes:
                steps.append(_check_step(plan, together, sources))
                together = []
            together.append(bucket)
        steps.append(_check_step(plan, together, sources))
    return ReshardPlan(
        plan.specs,
        plan.layout,
        plan.dtype,
        plan.shard_shapes,
        tuple((rank,) for rank in ranks),
        tuple(steps),
        plan.bucket_bytes,
        tuple(frozenset[int]() for _ in ranks),
    )


def _check_step(plan: ReshardPlan, buckets: Sequence[Bucket], sources: Mapping[tuple[int, int], int]) -> Step:
    moves = tuple(
        Move(i, shard, sources[i, shard], bucket.sender)
        for bucket in buckets
        for i in bucket.specs
        for shard in range(plan.specs[i].num_shards(plan.layout))
    )
    return Step(tuple(buckets), moves)
