"""The wire format of sequences, and distribution over a job of one rank. More ranks: tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.exchange import _decode, _encode, distribute
from gspo_megatron.errors import UserError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.types import RouteShape, Sequence

float32s = st.floats(width=32, allow_nan=False)
tokens = st.integers(0, 2**53)


@st.composite
def sequences_of(draw: st.DrawFn) -> Sequence:
    length = draw(st.integers(1, 6))

    def floats(n: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(float32s, min_size=n, max_size=n)), dtype=torch.float32)

    advantages = floats(length) if draw(st.booleans()) else floats(1).reshape(())
    return Sequence(
        index=draw(st.integers(0, 2**40)),
        token_ids=torch.tensor(draw(st.lists(tokens, min_size=length, max_size=length))),
        response_mask=torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length))),
        rollout_logprobs=floats(length),
        advantages=advantages,
    )


def assert_same(got: list[Sequence], given_: list[Sequence]) -> None:
    assert [s.index for s in got] == [s.index for s in given_]
    for a, b in zip(got, given_, strict=True):
        for name in ("token_ids", "response_mask", "rollout_logprobs", "advantages"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and torch.equal(x, y), name


@settings(max_examples=200, deadline=None)
@given(st.lists(sequences_of(), max_size=5), st.integers(0, 5))
def test_sequences_survive_the_wire_exactly(given_: list[Sequence], cut: int) -> None:
    flat = _encode(given_)
    assert flat.dtype == torch.float64
    assert_same(_decode(flat), given_)
    # What several heads send arrives joined.
    assert_same(_decode(torch.cat([_encode(given_[:cut]), _encode(given_[cut:])])), given_)


def test_values_that_float32_would_round_survive() -> None:
    s = Sequence(
        index=2**30 + 1,
        token_ids=torch.tensor([2**24 + 1, 2**31 + 7, 2**53 - 1]),
        response_mask=torch.tensor([False, True, True]),
        rollout_logprobs=torch.tensor([-0.1, -1e-38, -123.456]),
        advantages=torch.tensor(1 / 3),
    )
    assert_same(_decode(_encode([s])), [s])


def test_one_token_with_its_own_advantage_is_no_scalar() -> None:
    s = Sequence(0, torch.tensor([5]), torch.tensor([True]), torch.tensor([-1.0]), torch.tensor([0.5]))
    assert _decode(_encode([s]))[0].advantages.shape == (1,)


# --- a job of one rank -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessGroups]:
    path: Path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield ProcessGroups(ParallelLayout(), 0, *([world] * 10))
    dist.destroy_process_group()


def numbered(lengths: list[int]) -> list[Sequence]:
    return [
        Sequence(i, 100 * i + torch.arange(n), torch.arange(n) > 0, -torch.arange(float(n)), torch.tensor(float(i)))
        for i, n in enumerate(lengths)
    ]


def test_mini_batches_are_equal_runs_of_the_numbered_sequences(groups: ProcessGroups) -> None:
    given_ = numbered([4, 9, 2, 7, 7, 3, 8, 5])
    batches = distribute(
        given_[::-1], groups, mini_batches=4, token_budget=12, pad_token_id=0, device=torch.device("cpu")
    )
    assert [b.num_global_sequences for b in batches] == [2] * 4
    assert [b.num_global_tokens for b in batches] == [3 + 8, 1 + 6, 6 + 2, 7 + 4]  # all but each first token
    assert [len(b.micro_batches) for b in batches] == [2, 1, 1, 2]
    for j, batch in enumerate(batches):
        found = []
        for micro in batch.micro_batches:
            bounds = micro.cu_seqlens.tolist()
            for i, start, stop in zip(micro.sequence_ids.tolist(), bounds, bounds[1:], strict=False):
                found.append(i)
                assert torch.equal(micro.token_ids[start:stop], given_[i].token_ids)
        assert sorted(found) == [2 * j, 2 * j + 1]
        assert all(m.num_padding_tokens == 0 for m in batch.micro_batches)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2), ()])
def test_a_stage_gets_the_routes_of_its_layers(layers: tuple[int, ...], groups: ProcessGroups) -> None:
    """Exactly, also numbers that are no expert's: who replays them looks at that. Sequences may come without."""
    given_ = []
    for s in numbered([4, 9, 2, 7]):
        rows = s.token_ids.numel() - 1
        routes = torch.arange(rows * 6).reshape(rows, 3, 2).to(torch.int16) * 37 - 300
        given_.append(replace(s, routes=routes, routes_valid=torch.arange(rows) % 3 > 0))
    given_[3] = replace(given_[3], routes=None, routes_valid=None)
    [batch] = distribute(
        given_,
        groups,
        mini_batches=1,
        token_budget=12,
        pad_token_id=0,
        device=torch.device("cpu"),
        routes=RouteShape(layers, 3, 2),
    )
    for micro in batch.micro_batches:
        assert micro.routes is not None and micro.routes_valid is not None
        assert micro.routes.dtype == torch.int16 and micro.routes.shape == (micro.num_tokens, len(layers), 2)
        bounds = micro.cu_seqlens.tolist()
        for i, start, stop in zip(micro.sequence_ids.tolist(), bounds, bounds[1:], strict=False):
            s, last = given_[i], stop - 1
            assert not micro.routes_valid[last], "the engine never read it"
            if s.routes is None or s.routes_valid is None:
                assert not micro.routes_valid[start:stop].any()
                continue
            assert torch.equal(micro.routes[start:last], s.routes[:, list(layers)])
            assert torch.equal(micro.routes_valid[start:last], s.routes_valid)


def test_indices_that_are_no_run_from_zero_are_a_bug(groups: ProcessGroups) -> None:
    with pytest.raises(AssertionError, match="not 0 … N-1"):
        distribute(
            numbered([4, 4, 4])[1:], groups, mini_batches=1, token_budget=12, pad_token_id=0, device=torch.device("cpu")
        )


def test_a_sequence_above_the_budget_is_the_users_error(groups: ProcessGroups) -> None:
    with pytest.raises(UserError, match=r"data\.token_budget=6; raise it to at least 7"):
        distribute(numbered([7, 4]), groups, mini_batches=1, token_budget=6, pad_token_id=0, device=torch.device("cpu"))
