"""Sequences end to end in one micro-batch, against a definition token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.data.micro_batch import pack
from gspo_megatron.types import MicroBatch, Sequence

CPU = torch.device("cpu")
PAD = 3


def sequence(index: int, length: int, *, per_token: bool = False) -> Sequence:
    """No value occurs twice, within a sequence or between two; the response is the last half, with a gap."""
    mask = torch.arange(length) >= length // 2
    mask[length // 2 + 1 : length // 2 + 2] = False
    token_ids = 1000 * (index + 1) + torch.arange(length)
    logprobs = -(token_ids.float() / 7)
    advantages = token_ids.float() / 3 if per_token else torch.tensor(index + 0.5)
    return Sequence(index, token_ids, mask, logprobs, advantages)


def packed(sequences: list[Sequence], multiple_of: int = 1) -> MicroBatch:
    return pack(sequences, tensor_parallel=multiple_of, pad_token_id=PAD, device=CPU)


batches = st.tuples(
    st.lists(st.integers(2, 9), max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.sampled_from([1, 2, 4, 8]),
)


@settings(max_examples=200, deadline=None)
@given(batches)
def test_every_entry_is_what_the_definition_says(case: tuple[list[int], list[bool], int]) -> None:
    lengths, per_token, multiple_of = case
    sequences = [sequence(10 + i, n, per_token=per_token[i]) for i, n in enumerate(lengths)]
    micro = packed(sequences, multiple_of)
    total = sum(lengths)
    assert micro.num_tokens % multiple_of == 0
    padding = micro.num_tokens - total
    assert padding < max(multiple_of, 1) if total else padding == max(multiple_of, 2)
    assert micro.num_padding_tokens == padding

    bounds = micro.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == micro.num_tokens
    assert [b - a for a, b in itertools.pairwise(bounds)] == lengths + ([padding] if padding else [])
    assert micro.sequence_ids.tolist() == [s.index for s in sequences] + ([-1] if padding else [])
    assert micro.lengths.tolist() == lengths + ([0] if padding else [])
    assert micro.max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))

    token_wise = any(s.advantages.dim() == 1 for s in sequences)
    for s, start in zip(sequences, bounds, strict=False):
        length = s.token_ids.numel()
        for t in range(length):
            assert micro.token_ids[start + t] == s.token_ids[t]
            assert micro.positions[start + t] == t
        for t in range(length - 1):  # entry t concerns token t + 1 of the same sequence
            assert micro.targets[start + t] == s.token_ids[t + 1]
            assert micro.response_mask[start + t] == s.response_mask[t + 1]
            assert micro.rollout_logprobs[start + t] == s.rollout_logprobs[t + 1]
            if token_wise:
                expected = s.advantages[t + 1] if s.advantages.dim() else s.advantages
                assert micro.advantages[start + t] == expected
        last = start + length - 1  # never used: it would look into the next sequence
        assert not micro.response_mask[last]
        assert micro.targets[last] == PAD and micro.rollout_logprobs[last] == 0
    if not token_wise:
        assert micro.advantages.tolist() == [float(s.advantages) for s in sequences] + [0.0] * bool(padding)

    tail = slice(total, micro.num_tokens)
    assert torch.equal(micro.token_ids[tail], torch.full((padding,), PAD))
    assert torch.equal(micro.targets[tail], torch.full((padding,), PAD))
    assert torch.equal(micro.positions[tail], torch.arange(padding))
    assert not micro.response_mask[tail].any()
    assert not micro.rollout_logprobs[tail].any()
    if token_wise:
        assert not micro.advantages[tail].any()


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 4, 8])
def test_without_sequences_the_micro_batch_is_padding_alone(multiple_of: int) -> None:
    micro = packed([], multiple_of)
    assert micro.num_tokens == max(2, multiple_of)
    assert micro.sequence_ids.tolist() == [-1]
    assert micro.advantages.tolist() == [0.0]
    assert not micro.response_mask.any()
    assert bool(((micro.token_ids == PAD) & (micro.targets == PAD)).all())


TOKENWISE = ("token_ids", "targets", "positions", "response_mask", "rollout_logprobs")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 30), max_size=5), st.sampled_from([1, 2, 4]), st.sampled_from([2, 3, 4]), st.booleans())
def test_context_ranks_share_each_sequence_from_both_ends(
    lengths: list[int], tensor: int, context: int, per_token: bool
) -> None:
    sequences = [sequence(i, n, per_token=per_token) for i, n in enumerate(lengths)]
    whole = packed(sequences)
    shares = [
        pack(
            sequences,
            pad_token_id=PAD,
            device=CPU,
            tensor_parallel=tensor,
            context_parallel=context,
            context_rank=rank,
        )
        for rank in range(context)
    ]
    padded = [-(-n // (2 * context)) * 2 * context for n in lengths]
    total = sum(m.num_tokens for m in shares)
    trailing = total - sum(padded)
    assert {m.num_tokens for m in shares} == {total // context} and total // context % tensor == 0
    assert trailing < math.lcm(2 * context, context * tensor) or not lengths
    for rank, micro in enumerate(shares):
        assert micro.sequence_ids.tolist() == [*range(len(lengths))] + [-1] * bool(trailing)
        assert micro.lengths.tolist() == lengths + [0] * bool(trailing)
        assert micro.num_padding_tokens == total - sum(lengths)
        bounds = micro.cu_seqlens.tolist()
        expected = [n // context for n in padded] + [trailing // context] * bool(trailing)
        assert [b - a for a, b in itertools.pairwise(bounds)] == expected
        assert micro.max_seqlen == max(expected)
        for (a, b), length in zip(itertools.pairwise(bounds), padded, strict=False):
            chunk = length // (2 * context)
            front, back = rank * chunk, (2 * context - 1 - rank) * chunk
            assert micro.positions[a:b].tolist() == [
                *range(front, front + chunk),
                *range(back, back + chunk),
            ]
    # Put together by position, the shares are the pack of whole sequences, and padding behind each.
    for i, length in enumerate(lengths):
        at = slice(int(whole.cu_seqlens[i]), int(whole.cu_seqlens[i + 1]))
        for name in (*TOKENWISE, *(["advantages"] if per_token else [])):
            parts = [(m, slice(int(m.cu_seqlens[i]), int(m.cu_seqlens[i + 1]))) for m in shares]
            positions = torch.cat([m.positions[s] for m, s in parts])
            values = torch.cat([getattr(m, name)[s] for m, s in parts])[positions.argsort()]
            assert torch.equal(values[:length], getattr(whole, name)[at]), name
            if name == "response_mask":
                assert not values[length:].any()
    if not per_token:
        assert all(m.advantages.tolist() == [s.advantages for s in sequences] + [0.0] * bool(trailing) for m in shares)


def test_no_padding_where_the_tokens_divide() -> None:
    micro = packed([sequence(0, 3), sequence(1, 5)], 4)
    assert micro.sequence_ids.tolist() == [0, 1] and micro.num_tokens == 8


@pytest.mark.parametrize("sequences", [[], [sequence(0, 5)], [sequence(0, 4), sequence(1, 3, per_token=True)]])
def test_dtypes_are_those_the_types_promise(sequences: list[Sequence]) -> None:
    micro = packed(sequences, 4)
    dtypes = {
        "token_ids": torch.int64,
        "targets": torch.int64,
        "positions": torch.int64,
        "cu_seqlens": torch.int32,
        "sequence_ids": torch.int64,
        "lengths": torch.int64,
        "response_mask": torch.bool,
        "rollout_logprobs": torch.float32,
        "advantages": torch.float32,
    }
    assert {name: getattr(micro, name).dtype for name in dtypes} == dtypes
    assert (micro.old_logprobs, micro.reference_logprobs, micro.routes, micro.routes_valid) == (None,) * 4


def test_a_response_from_the_first_token_loses_the_one_nothing_predicts() -> None:
    s = Sequence(0, torch.arange(4), torch.ones(4, dtype=torch.bool), torch.arange(4.0), torch.tensor(1.0))
    micro = packed([s])
    assert micro.response_mask.tolist() == [True, True, True, False]
    assert micro.rollout_logprobs.tolist() == [1.0, 2.0, 3.0, 0.0]


def test_a_fully_masked_sequence_is_packed_and_counted() -> None:
    s = sequence(4, 6)
    masked = Sequence(4, s.token_ids, torch.zeros(6, dtype=torch.bool), s.rollout_logprobs, s.advantages)
    micro = packed([masked, sequence(5, 3)])
    assert micro.sequence_ids.tolist() == [4, 5]
    assert not micro.response_mask[:6].any() and micro.response_mask[6:].any()


def test_the_given_sequences_are_not_changed() -> None:
    s = sequence(0, 6)
    before = [t.clone() for t in (s.token_ids, s.response_mask, s.rollout_logprobs, s.advantages)]
    micro = packed([s])
    for value in vars(micro).values():
        if isinstance(value, Tensor):
            value.zero_()
    after = [s.token_ids, s.response_mask, s.rollout_logprobs, s.advantages]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
