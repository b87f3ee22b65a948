"""Sequences packed end to end into one micro-batch, or into one context-parallel rank's share of it."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from gspo_megatron.types import MicroBatch, RouteShape, Sequence


def pack(
    sequences: SequenceOf[Sequence],
    *,
    pad_token_id: int,
    device: torch.device,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    context_rank: int = 0,
    tensor_rank: int = 0,
    routes: RouteShape | None = None,
) -> MicroBatch:
    """One micro-batch, padded no further than the layout demands.

    Context parallelism cuts each sequence into 2 × context_parallel equal chunks, so that each is padded to a
    multiple of it; sequence parallelism cuts a rank's tokens over the tensor-parallel ranks, so that a trailing
    padding sequence fills T up. With no sequences at all the micro-batch is padding alone: it trains nothing,
    but its collectives run. With `routes` it carries those of the sequences, as far as this rank's routers see them.
    """
    chunks = 2 * context_parallel if context_parallel > 1 else 1
    multiple_of = math.lcm(chunks, context_parallel * tensor_parallel)
    real_lengths = [s.token_ids.numel() for s in sequences]
    lengths = [-(-n // chunks) * chunks for n in real_lengths]
    trailing = -sum(lengths) % multiple_of if lengths else max(multiple_of, 2)
    if trailing:
        lengths.append(trailing)
    share = context_share(lengths, context_parallel=context_parallel, context_rank=context_rank)

    def joined(parts: list[Tensor], fill: float, dtype: torch.dtype) -> Tensor:
        """Each sequence's values behind its start in the pack, `fill` elsewhere; this rank's share of them."""
        whole = torch.full((sum(lengths),), fill, dtype=dtype)
        start = 0
        for part, length in zip(parts, lengths, strict=False):
            whole[start : start + part.numel()] = part
            start += length
        return whole[share]

    def shifted(x: Tensor) -> Tensor:
        """Entry t says something about token t+1; the last entry is never used."""
        return x[1:]

    if any(s.advantages.dim() == 1 for s in sequences):
        advantages = joined([shifted(s.advantages.expand(s.token_ids.shape)) for s in sequences], 0, torch.float32)
    else:
        advantages = torch.tensor([float(s.advantages) for s in sequences] + [0.0] * bool(trailing))
    micro = MicroBatch(
        token_ids=joined([s.token_ids for s in sequences], pad_token_id, torch.int64),
        targets=joined([shifted(s.token_ids) for s in sequences], pad_token_id, torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths])[share],
        cu_seqlens=(torch.tensor([0, *lengths]).cumsum(0) // context_parallel).to(torch.int32),
        sequence_ids=torch.tensor([s.index for s in sequences] + [-1] * bool(trailing)),
        lengths=torch.tensor(real_lengths + [0] * bool(trailing)),
        response_mask=joined([shifted(s.response_mask) for s in sequences], 0, torch.bool),
        rollout_logprobs=joined([shifted(s.rollout_logprobs) for s in sequences], 0, torch.float32),
        advantages=advantages,
        max_seqlen=max(lengths) // context_parallel,
        num_padding_tokens=sum(lengths) - sum(real_lengths),
    )
    if routes is not None:
        rows = share.chunk(tensor_parallel)[tensor_rank]
        micro.routes, micro.routes_valid = _packed_routes(sequences, lengths, rows, routes)
    for name, value in vars(micro).items():
        if isinstance(value, Tensor):
            setattr(micro, name, value.to(device))
    return micro


def _packed_routes(
    sequences: SequenceOf[Sequence], lengths: SequenceOf[int], rows: Tensor, shape: RouteShape
) -> tuple[Tensor, Tensor]:
    """Experts [T/tp, layers, k] of the tokens `rows` of the pack, and [T/tp] whether there are any."""
    experts = torch.zeros(sum(lengths), len(shape.layers), shape.experts_per_token, dtype=torch.int16)
    valid = torch.zeros(sum(lengths), dtype=torch.bool)
    start = 0
    for sequence, length in zip(sequences, lengths, strict=False):
        if sequence.routes is not None:
            assert sequence.routes_valid is not None
            at = slice(start, start + len(sequence.routes))  # of input tokens: the last one has none
            experts[at], valid[at] = sequence.routes, sequence.routes_valid
        start += length
    return experts[rows], valid[rows]


def context_share(lengths: SequenceOf[int], *, context_parallel: int, context_rank: int) -> Tensor:
    """[T / context_parallel] int64: the tokens of a pack that one context-parallel rank holds.

    Of each sequence, cut into 2 × context_parallel chunks, rank r holds chunk r and the r-th from the end: with a
    causal mask every rank then has as much to attend to (zigzag; Llama 3, arXiv 2407.21783, section 3.3.2).
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    if context_parallel == 1:
        return torch.arange(sum(lengths))
    pieces = []
    for start, length in zip(starts, lengths, strict=True):
        chunk = length // (2 * context_parallel)
        for number in (context_rank, 2 * context_parallel - 1 - context_rank):
            pieces.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(pieces)
