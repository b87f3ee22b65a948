"""The gather plan: pure data, checked against ownership computed another way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import find_family
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.gather import GatherPlan, plan_gather
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


def plan(layout: ParallelLayout, destinations: Sequence[int], bucket_numel: int = 200) -> GatherPlan:
    return plan_gather(
        SPECS,
        layout,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        destinations=destinations,
        bucket_numel=bucket_numel,
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


@st.composite
def plans(draw: st.DrawFn) -> tuple[ParallelLayout, list[int], int]:
    layout = draw(layouts())
    heads = [layout.head_rank(d) for d in range(layout.data)]
    some = draw(st.lists(st.integers(0, layout.world_size - 1), min_size=1, max_size=3, unique=True))
    destinations = draw(st.sampled_from([heads, [0], some]))
    return layout, destinations, draw(st.sampled_from([1, 64, 300, 10**6]))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_shard_reaches_every_destination_once_from_a_rank_that_holds_it(
    case: tuple[ParallelLayout, list[int], int],
) -> None:
    layout, destinations, bucket_numel = case
    made = plan(layout, destinations, bucket_numel)
    held = [held_by(rank, layout) for rank in range(layout.world_size)]
    exported = [s for s in SPECS if not s.load_only]
    assert [s.megatron for s in made.specs] == [s.megatron for s in exported]

    arrivals: Counter[tuple[str, int, int]] = Counter()
    for bucket, moves in zip(made.buckets, made.moves, strict=True):
        assert {m.spec for m in moves} == set(bucket), "a move belongs to the bucket of its tensor"
        for move in moves:
            name = made.specs[move.spec].megatron
            assert (name, move.shard) in held[move.source]
            arrivals[name, move.shard, move.destination] += 1
            cut = made.specs[move.spec].dim is not None
            if cut and (name, move.shard) in held[move.destination]:
                assert move.source == move.destination, "a destination takes its own shard"
    wanted = {(s.megatron, i, d) for s in exported for i in range(s.num_shards(layout)) for d in destinations}
    assert arrivals == Counter(wanted)

    flat = [i for bucket in made.buckets for i in bucket]
    assert flat == list(range(len(exported))), "export order, every tensor in one bucket"
    for bucket in made.buckets:
        assert len(bucket) == 1 or sum(made.specs[i].numel for i in bucket) <= bucket_numel
    assert plan(layout, destinations, bucket_numel) == made


def whole_model() -> dict[str, Tensor]:
    """A value for every HF tensor."""
    generator = torch.Generator().manual_seed(2)
    shapes = {name: shape for s in SPECS for name, shape in zip(s.hf, s.hf_shapes, strict=True)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


WHOLE = whole_model()


@settings(max_examples=25, deadline=None)
@given(plans())
def test_carrying_out_the_plan_by_hand_gives_back_the_checkpoint_bitwise(
    case: tuple[ParallelLayout, list[int], int],
) -> None:
    layout, destinations, bucket_numel = case
    made = plan(layout, destinations, bucket_numel)
    for destination in destinations:
        shards: dict[int, dict[int, Tensor]] = {}
        for moves in made.moves:
            for move in (m for m in moves if m.destination == destination):
                spec = made.specs[move.spec]
                parameter = spec.codec.to_megatron([WHOLE[name] for name in spec.hf])
                count = spec.num_shards(layout)
                piece = parameter if spec.dim is None else spec.codec.shard(parameter, spec.dim, move.shard, count)
                shards.setdefault(move.spec, {})[move.shard] = piece
        exported: dict[str, Tensor] = {}
        for index, by_shard in shards.items():
            spec = made.specs[index]
            ordered = [by_shard[i] for i in range(len(by_shard))]
            parameter = ordered[0] if spec.dim is None else spec.codec.unshard(ordered, spec.dim)
            exported |= dict(zip(spec.hf, spec.codec.to_hf(parameter), strict=True))
        assert exported.keys() == WHOLE.keys()
        assert all(torch.equal(exported[name], WHOLE[name]) for name in WHOLE)


def test_a_tied_head_is_not_exported() -> None:
    specs, fields = model(tie_word_embeddings=True)
    made = plan_gather(
        specs,
        ParallelLayout(pipeline=2),
        num_layers=fields.num_layers,
        num_experts=fields.num_experts,
        destinations=[0],
        bucket_numel=100,
    )
    assert "output_layer.weight" not in {s.megatron for s in made.specs}
    assert "lm_head.weight" not in {name for s in made.specs for name in s.hf}


def test_one_rank_sends_nothing() -> None:
    made = plan(ParallelLayout(), [0])
    assert made.sent_numel(0) == 0
    assert all(m.source == m.destination == 0 for moves in made.moves for m in moves)


def test_sent_elements_include_the_padding_of_the_vocabulary() -> None:
    made = plan(ParallelLayout(tensor=4), [0])
    padded = 2 * 16 * 8  # embedding and head, 13 rows padded to 16
    cut = padded + sum(s.numel for s in SPECS if s.dim is not None and "word_embeddings" not in s.megatron)
    cut -= next(s.numel for s in SPECS if s.megatron == "output_layer.weight")
    experts = sum(s.numel for s in SPECS if s.expert is not None)
    dense_share = (cut - experts) // 4
    # Experts are not cut (expert_tensor = 1) and rank 0 holds all of them; whole tensors are rank 0's own.
    assert [made.sent_numel(rank) for rank in range(4)] == [0, dense_share, dense_share, dense_share]


@pytest.mark.parametrize(
    ("layout", "destinations"),
    [
        (ParallelLayout(data=4, pipeline=2), [0]),  # four replicas of the second stage to send from
        (ParallelLayout(data=4, expert=2), [0, 1, 2, 3]),
        (ParallelLayout(tensor=2, data=4, pipeline=2, expert=2), [0, 2, 4, 6]),
        (ParallelLayout(context=2, data=2, pipeline=2), [0, 2]),
    ],
)
def test_replicas_share_the_sending(layout: ParallelLayout, destinations: list[int]) -> None:
    made = plan(layout, destinations)
    sent = [made.sent_numel(rank) for rank in range(layout.world_size)]
    largest = max(s.numel for s in SPECS)
    busy: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(layout.world_size):
        if layout.tensor > 1 and layout.coordinates(rank).tensor > 0:
            continue  # norms come from the first tensor rank alone
        busy.setdefault(tuple(sorted(held_by(rank, layout))), []).append(sent[rank])
    assert sum(sent) > 0
    for amounts in busy.values():
        # Ranks with the same holdings; a destination sends less, for it takes its own.
        senders = [a for a in amounts if a > 0]
        if len(senders) > 1:
            assert max(senders) - min(senders) <= largest


def test_sixty_four_ranks_of_a_30b_model_are_planned_in_seconds() -> None:
    specs, _ = model(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        mlp_only_layers=[],
    )
    layout = ParallelLayout(tensor=4, pipeline=2, data=8, expert=8)
    assert layout.world_size == 64
    heads = [layout.head_rank(d) for d in range(8)]
    start = time.process_time()
    made = plan_gather(specs, layout, num_layers=48, num_experts=128, destinations=heads, bucket_numel=64 * 2**20)
    assert time.process_time() - start < 10
    assert sum(s.numel for s in made.specs) == 30_532_122_624
    largest = max(s.numel for s in specs)
    assert all(sum(made.specs[i].numel for i in b) <= max(64 * 2**20, largest) for b in made.buckets)
    # Each head lacks the other stage, three quarters of the dense cuts and seven eighths of the experts.
    sent = [made.sent_numel(rank) for rank in range(64)]
    assert 0.85 * 8 * 30.5e9 < sum(sent) < 8 * 30.5e9
    assert max(sent) < 3 * sum(sent) / 64
