"""The reshard plan: pure data, checked against ownership computed another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import find_family
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.gather import GatheredBucket
from gspo_megatron.weights.reshard import ReshardPlan, plan_reshard
from gspo_megatron.weights.rules import TensorSpec

VOCAB, LAYERS, EXPERTS = 13, 4, 8


def model(**changes: Any) -> tuple[list[TensorSpec], ModelFields]:
    """A tiny MoE with a dense layer, and a vocabulary that no degree divides."""
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 2,
        "max_position_embeddings": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [2],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    } | changes
    family = find_family(config)
    fields = family.fields(config)
    return family.specs(fields), fields


SPECS, FIELDS = model()


def plan(
    layout: ParallelLayout, feeds: Sequence[Sequence[int]], bucket_bytes: int = 800, max_senders: int = 64
) -> ReshardPlan:
    return plan_reshard(
        SPECS,
        layout,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        feeds=feeds,
        dtype=torch.float32,
        bucket_bytes=bucket_bytes,
        max_senders=max_senders,
    )


def held_by(rank: int, layout: ParallelLayout) -> set[tuple[str, int]]:
    """(Megatron name, shard) of everything a rank holds, from the order in which Megatron numbers ranks."""
    stage_size = layout.tensor * layout.context * layout.data
    stage, within = rank // stage_size, rank % stage_size
    tensor = within % layout.tensor
    expert_tensor = within % layout.expert_tensor
    expert = within // layout.expert_tensor % layout.expert
    layers_here = range(stage * LAYERS // layout.pipeline, (stage + 1) * LAYERS // layout.pipeline)
    experts_here = range(expert * EXPERTS // layout.expert, (expert + 1) * EXPERTS // layout.expert)
    held = set()
    for spec in SPECS:
        if "decoder.layers." in spec.megatron:
            here = int(spec.megatron.split(".")[2]) in layers_here
        elif "embedding" in spec.megatron:
            here = stage == 0
        else:
            here = stage == layout.pipeline - 1
        if "local_experts" in spec.megatron:
            here &= int(spec.megatron.split("local_experts.")[1].split(".")[0]) in experts_here
            shard = expert_tensor
        else:
            shard = tensor
        if here:
            held.add((spec.megatron, 0 if spec.dim is None else shard))
    return held


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tensor, pipeline = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    context, data = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4]))
    stage = tensor * context * data
    pairs = [(e, t) for e in (1, 2, 4, 8) for t in (1, 2, 4) if stage % (e * t) == 0]
    expert, expert_tensor = draw(st.sampled_from(pairs))
    return ParallelLayout(
        tensor=tensor, pipeline=pipeline, context=context, data=data, expert=expert, expert_tensor=expert_tensor
    )


@dataclass(frozen=True)
class Case:
    layout: ParallelLayout
    feeds: list[list[int]]
    bucket_bytes: int
    max_senders: int

    def plan(self) -> ReshardPlan:
        return plan(self.layout, self.feeds, self.bucket_bytes, self.max_senders)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(layouts())
    everyone = list(range(layout.world_size))
    heads = [[layout.head_rank(d)] for d in range(layout.data)]
    some = draw(st.lists(st.sampled_from(everyone), min_size=1, max_size=6, unique=True))
    middle = max(1, len(everyone) // 2)
    machines = [part for part in (everyone[:middle], everyone[middle:]) if part]
    feeds = draw(st.sampled_from([heads, [[0]], [everyone], machines, [some], [some, [0]]]))
    return Case(layout, feeds, draw(st.sampled_from([4, 256, 1200, 4 * 10**6])), draw(st.sampled_from([1, 3, 64])))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_feed_gets_every_tensor_once_from_one_of_its_ranks(case: Case) -> None:
    made = case.plan()
    held = [held_by(rank, case.layout) for rank in range(case.layout.world_size)]
    exported = [s for s in SPECS if not s.load_only]
    assert [s.megatron for s in made.specs] == [s.megatron for s in exported]
    for number, feed in enumerate(case.feeds):
        buckets = [b for step in made.steps for b in step.buckets if b.feed == number]
        assert sorted(i for b in buckets for i in b.specs) == list(range(len(exported)))
        assert {b.sender for b in buckets} <= set(feed)
        assert set(made.senders(number)) == {b.sender for b in buckets}
        assert len(made.senders(number)) <= max(case.max_senders, case.layout.pipeline)
        assert sum(made.sent_bytes(number).values()) == made.num_bytes == 4 * sum(s.numel for s in exported)
        for b in buckets:
            assert list(b.specs) == sorted(b.specs)
            assert b.nbytes == 4 * sum(exported[i].numel for i in b.specs)
            assert len(b.specs) == 1 or b.nbytes <= case.bucket_bytes
            assert b.nbytes <= made.bucket_bytes
    for step in made.steps:
        arrivals = Counter((m.spec, m.shard, m.destination) for m in step.moves)
        wanted = Counter(
            (i, shard, b.sender)
            for b in step.buckets
            for i in b.specs
            for shard in range(exported[i].num_shards(case.layout))
        )
        assert arrivals == wanted, "each shard reaches its sender once, and nobody else"
        assert len({b.feed for b in step.buckets}) == len(step.buckets)
        for move in step.moves:
            spec = made.specs[move.spec]
            assert (spec.megatron, move.shard) in held[move.source]
            if spec.dim is not None and (spec.megatron, move.shard) in held[move.destination]:
                assert move.source == move.destination, "a sender takes its own shard"
    assert case.plan() == made


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_rank_needs_more_than_two_buckets_and_one_for_each_further_feed(case: Case) -> None:
    """One on its way, one arriving; to each other feed's sender it may give one."""
    made = case.plan()
    buckets = 1 + len(case.feeds)
    padding = 4 * 2 * 8 * 3  # rows of the vocabulary that fill it up to a multiple of the tensor-parallel degree
    assert all(made.peak_bytes(r) <= buckets * (made.bucket_bytes + padding) for r in range(case.layout.world_size))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_experts_are_sent_by_a_rank_that_has_them_unless_they_are_counted(layout: ParallelLayout) -> None:
    made = plan(layout, [range(layout.world_size)])
    for step in made.steps:
        for bucket in step.buckets:
            for i in bucket.specs:
                spec = made.specs[i]
                if spec.expert is None:
                    continue
                place = layout.coordinates(bucket.sender)
                has_it = place.expert == spec.expert * layout.expert // EXPERTS
                assert has_it == (i not in made.relayed[0])
                assert place.pipeline == spec.pipeline_stage(layout, LAYERS)
    assert made.relayed_bytes(0) == sum(made.spec_bytes(i) for i in made.relayed[0])


def test_no_expert_moves_where_the_ranks_are_balanced() -> None:
    """Without a vocabulary, every expert-parallel rank has as much to send as the others."""
    specs = [s for s in SPECS if s.layer is not None]
    layout = ParallelLayout(data=4, expert=4, pipeline=2)
    made = plan_reshard(
        specs, layout, num_layers=LAYERS, num_experts=EXPERTS, feeds=[range(8)], dtype=torch.float32, bucket_bytes=800
    )
    assert made.relayed_bytes(0) == 0 and made.senders(0) == tuple(range(8))
    assert all(made.gathered_bytes(rank) == 0 for rank in range(8)), "nothing to gather without tensor parallelism"


def whole_model() -> dict[str, Tensor]:
    """A value for every HF tensor."""
    generator = torch.Generator().manual_seed(2)
    shapes = {name: shape for s in SPECS for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


WHOLE = whole_model()


@settings(max_examples=25, deadline=None)
@given(cases())
def test_carrying_out_the_plan_by_hand_gives_back_the_checkpoint_bitwise(case: Case) -> None:
    made = case.plan()
    received: list[dict[str, Tensor]] = [{} for _ in case.feeds]
    for number, step in enumerate(made.steps):
        for bucket in step.buckets:
            shards = {}
            for move in (m for m in step.moves if m.destination == bucket.sender and m.spec in bucket.specs):
                spec = made.specs[move.spec]
                parameter = spec.codec.to_megatron([WHOLE[name] for name in spec.hf])
                count = spec.num_shards(case.layout)
                piece = parameter if spec.dim is None else spec.codec.shard(parameter, spec.dim, move.shard, count)
                shards[move.spec, move.shard] = piece
            for item in GatheredBucket(number, len(made.steps), bucket, made, shards):
                assert item.name not in received[bucket.feed]
                received[bucket.feed][item.name] = item.tensor
    for exported in received:
        assert exported.keys() == WHOLE.keys()
        assert all(torch.equal(exported[name], WHOLE[name]) for name in WHOLE)


def test_a_bucket_is_converted_to_the_dtype_that_is_sent() -> None:
    made = plan_reshard(
        SPECS,
        ParallelLayout(),
        num_layers=LAYERS,
        num_experts=EXPERTS,
        feeds=[[0]],
        dtype=torch.bfloat16,
        bucket_bytes=10**6,
    )
    [step] = made.steps
    shards = {(m.spec, m.shard): _parameter(made.specs[m.spec]) for m in step.moves}
    flat = GatheredBucket(0, 1, step.buckets[0], made, shards).assemble()
    assert flat.flat.numel() == made.num_bytes == 2 * sum(t.numel() for t in WHOLE.values())
    assert all(torch.equal(item.tensor, WHOLE[item.name].bfloat16()) for item in flat.tensors)
    assert torch.equal(torch.cat([t.tensor.flatten() for t in flat.tensors]), flat.flat.view(torch.bfloat16))


def _parameter(spec: TensorSpec) -> Tensor:
    return spec.codec.to_megatron([WHOLE[name] for name in spec.hf])


def test_a_tied_head_is_not_exported() -> None:
    specs, fields = model(tie_word_embeddings=True)
    made = plan_reshard(
        specs,
        ParallelLayout(pipeline=2),
        num_layers=fields.num_layers,
        num_experts=fields.num_experts,
        feeds=[[0]],
        dtype=torch.float32,
        bucket_bytes=400,
    )
    assert "output_layer.weight" not in {s.megatron for s in made.specs}
    assert "lm_head.weight" not in {name for s in made.specs for name in s.hf}


def test_one_rank_gathers_nothing() -> None:
    made = plan(ParallelLayout(), [[0]])
    assert made.given_bytes(0) == made.gathered_bytes(0) == 0
    assert made.peak_bytes(0) <= 2 * made.bucket_bytes


def test_given_bytes_include_the_padding_of_the_vocabulary() -> None:
    made = plan(ParallelLayout(tensor=4), [[0]])
    padded = 2 * 16 * 8  # embedding and head, 13 rows padded to 16
    cut = padded + sum(s.numel for s in SPECS if s.dim is not None and "word_embeddings" not in s.megatron)
    cut -= next(s.numel for s in SPECS if s.megatron == "output_layer.weight")
    experts = sum(s.numel for s in SPECS if s.expert is not None)
    dense_share = (cut - experts) // 4 * 4  # a quarter of the elements, 4 bytes each
    # Experts are not cut (expert_tensor = 1) and rank 0 holds all of them; whole tensors are rank 0's own.
    assert [made.given_bytes(rank) for rank in range(4)] == [0, dense_share, dense_share, dense_share]
    assert made.gathered_bytes(0) == 3 * dense_share


@pytest.mark.parametrize(
    ("layout", "destinations"),
    [
        (ParallelLayout(data=4, pipeline=2), [0]),  # four replicas of the second stage to send from
        (ParallelLayout(data=4, expert=2), [0, 1, 2, 3]),
        (ParallelLayout(tensor=2, data=4, pipeline=2, expert=2), [0, 2, 4, 6]),
        (ParallelLayout(context=2, data=2, pipeline=2), [0, 2]),
    ],
)
def test_replicas_share_what_senders_lack(layout: ParallelLayout, destinations: list[int]) -> None:
    made = plan(layout, [[d] for d in destinations])
    given_away = [made.given_bytes(rank) for rank in range(layout.world_size)]
    largest = 4 * max(s.numel for s in SPECS)
    busy: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(layout.world_size):
        if layout.tensor > 1 and layout.coordinates(rank).tensor > 0:
            continue  # norms come from the first tensor rank alone
        busy.setdefault(tuple(sorted(held_by(rank, layout))), []).append(given_away[rank])
    assert sum(given_away) > 0
    for amounts in busy.values():
        # Ranks with the same holdings; a sender gives less, for it takes its own.
        senders = [a for a in amounts if a > 0]
        if len(senders) > 1:
            assert max(senders) - min(senders) <= largest
