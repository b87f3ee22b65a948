"""Codecs, and the expansion of a rule table into the parameters of a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.rules import (
    QKV,
    Codec,
    Copy,
    GateUp,
    Rule,
    Vocabulary,
    expand,
    padded_vocab_size,
)


def numbered(*shape: int) -> Tensor:
    """Every element is another number: a misplaced one can't go unseen."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def parts(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbered tensors that share no number."""
    flat = numbered(sum(torch.Size(s).numel() for s in shapes))
    sizes = [torch.Size(s).numel() for s in shapes]
    return [piece.reshape(s) for piece, s in zip(flat.split(sizes), shapes, strict=True)]


def placed(codec: Codec, shards: list[Tensor], dim: int | None, like: list[Tensor]) -> list[Tensor]:
    """HF tensors put together from all shards; what no shard reaches is NaN."""
    targets = [torch.full_like(t, torch.nan) for t in like]
    for index, shard in enumerate(shards):
        codec.place(shard, dim, index, len(shards), targets)
    return targets


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


degrees = st.sampled_from([1, 2, 3, 4])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Codec, list[Tensor], int, int]:
    """A codec, HF tensors for it, the axis that is cut, and the degree it is cut by."""
    count, width = draw(degrees), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["column", "row", "qkv", "gate_up", "vocabulary"]))
    rows = count * draw(st.integers(1, 3))
    if kind == "column":
        return Copy(), parts((rows, width)), 0, count
    if kind == "row":
        return Copy(), parts((width, rows)), 1, count
    if kind == "gate_up":
        return GateUp(), parts((rows, width), (rows, width)), 0, count
    if kind == "vocabulary":
        vocab = draw(st.integers(1, 13))
        return Vocabulary(vocab), parts((vocab, width)), 0, count
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kv = (rows * head_dim, width)
    return QKV(rows, heads, head_dim), parts((rows * heads * head_dim, width), kv, kv), 0, count


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_codec_is_inverted_bitwise_in_every_degree(case: tuple[Codec, list[Tensor], int, int]) -> None:
    codec, tensors, dim, count = case
    whole = codec.to_megatron(tensors)
    assert_equal(placed(codec, [whole], None, tensors), tensors)
    shards = [codec.shard(whole, dim, i, count) for i in range(count)]
    assert len({tuple(s.shape) for s in shards}) == 1, "every rank's parameter has the same shape"
    assert_equal(placed(codec, shards, dim, tensors), tensors)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_qkv_puts_the_queries_of_a_group_before_its_key_and_value(count: int) -> None:
    groups, heads, dim, hidden = 4, 3, 2, 5
    q, k, v = parts((groups * heads * dim, hidden), (groups * dim, hidden), (groups * dim, hidden))
    codec = QKV(groups, heads, dim)
    expected = []
    for group in range(groups):
        expected.append(q[group * heads * dim : (group + 1) * heads * dim])
        expected.append(k[group * dim : (group + 1) * dim])
        expected.append(v[group * dim : (group + 1) * dim])
    whole = codec.to_megatron([q, k, v])
    assert torch.equal(whole, torch.cat(expected))
    # A tensor rank holds whole groups: its shard is the same layout of its own heads.
    here = groups // count
    for rank in range(count):
        expected = [everything.chunk(count)[rank] for everything in (q, k, v)]
        own = QKV(here, heads, dim)
        assert_equal(placed(own, [codec.shard(whole, 0, rank, count)], None, expected), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_tensor_rank_holds_its_piece_of_gate_and_of_up(count: int) -> None:
    gate, up = parts((6, 4), (6, 4))
    whole = GateUp().to_megatron([gate, up])
    for rank in range(count):
        expected = torch.cat([gate.chunk(count)[rank], up.chunk(count)[rank]])
        assert torch.equal(GateUp().shard(whole, 0, rank, count), expected)


@pytest.mark.parametrize(("vocab", "count", "rows"), [(131, 1, 131), (131, 2, 66), (131, 4, 33), (8, 4, 2), (3, 4, 1)])
def test_the_vocabulary_is_padded_with_zero_rows(vocab: int, count: int, rows: int) -> None:
    table = 1 + numbered(vocab, 2)
    codec = Vocabulary(vocab)
    shards = [codec.shard(table, 0, i, count) for i in range(count)]
    assert [s.shape for s in shards] == [(rows, 2)] * count
    assert padded_vocab_size(vocab, count) == rows * count
    joined = torch.cat(shards)
    assert torch.equal(joined[:vocab], table)
    assert torch.equal(joined[vocab:], torch.zeros(rows * count - vocab, 2))


def test_what_is_exported_does_not_depend_on_the_padding_rows() -> None:
    codec = Vocabulary(5)
    shards = [codec.shard(numbered(5, 2), 0, i, 4) for i in range(4)]
    shards[3] += torch.nan
    assert_equal(placed(codec, shards, 0, [numbered(5, 2)]), [numbered(5, 2)])


TABLE = [
    Rule("output_layer.weight", ("head",), ((7, 2),), Vocabulary(7), dim=0),
    Rule("decoder.layers.{layer}.a", ("a.{layer}",), ((4, 2),), dim=0),
    Rule(
        "decoder.layers.{layer}.e.{expert}.b", ("b.{layer}.{expert}",), ((4, 2),), dim=1, layers=(1, 3), num_experts=2
    ),
    Rule("embedding.word_embeddings.weight", ("embed",), ((7, 2),), Vocabulary(7), dim=0),
    Rule("decoder.final_layernorm.weight", ("norm",), ((2,),)),
]


def test_expand_names_every_parameter_once_in_the_order_of_the_model() -> None:
    specs = expand(TABLE, num_layers=4)
    assert [s.hf for s in specs] == [
        ("embed",),
        ("a.0",),
        ("a.1",),
        ("b.1.0",),
        ("b.1.1",),
        ("a.2",),
        ("a.3",),
        ("b.3.0",),
        ("b.3.1",),
        ("head",),
        ("norm",),
    ]
    assert [s.megatron for s in specs[3:5]] == ["decoder.layers.1.e.0.b", "decoder.layers.1.e.1.b"]
    assert [(s.layer, s.expert) for s in specs[:4]] == [(None, None), (0, None), (1, None), (1, 0)]


def test_a_parameter_is_cut_by_the_degree_of_its_own_grid() -> None:
    layout = ParallelLayout(tensor=4, data=2, expert=2, expert_tensor=2)
    by_name = {s.hf[0]: s for s in expand(TABLE, num_layers=4)}
    assert by_name["a.0"].num_shards(layout) == 4
    assert by_name["b.1.0"].num_shards(layout) == 2
    assert by_name["norm"].num_shards(layout) == 1
    assert by_name["a.0"].numel == 8


@pytest.mark.parametrize(("pipeline", "stages"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3])])
def test_pipeline_stages_hold_equal_runs_of_layers_and_the_ends(pipeline: int, stages: list[int]) -> None:
    layout = ParallelLayout(pipeline=pipeline)
    by_name = {s.hf[0]: s.pipeline_stage(layout, 4) for s in expand(TABLE, num_layers=4)}
    assert [by_name[f"a.{i}"] for i in range(4)] == stages
    assert by_name["b.3.1"] == stages[3]
    assert by_name["embed"] == 0
    assert by_name["norm"] == by_name["head"] == pipeline - 1
