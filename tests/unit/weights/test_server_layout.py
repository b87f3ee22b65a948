"""What a server makes of HF tensors, and the plan that checks it. Against real servers: tests/system."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import find_family
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.reshard import plan_reshard
from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.server_layout import ServerLayout, plan_check, server_parameters, server_piece


def model(**changes: Any) -> tuple[list[TensorSpec], ModelFields]:
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 70,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [2],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    } | changes
    family = find_family(config)
    fields = family.fields(config)
    return [s for s in family.specs(fields) if not s.load_only], fields


SPECS, FIELDS = model()
GENERATOR = torch.Generator().manual_seed(3)
WHOLE = {n: torch.randn(shape, generator=GENERATOR) for s in SPECS for n, shape in zip(s.hf, s.hf_shapes, strict=True)}
BY_NAME = {p.name: p for p in server_parameters(SPECS)}


def on_rank(name: str, layout: ServerLayout, rank: int) -> Tensor:
    pieces = [
        server_piece(SPECS[i], [WHOLE[n] for n in SPECS[i].hf], layout, rank, num_experts=FIELDS.num_experts)
        for i in BY_NAME[name].specs
    ]
    return torch.cat([p for p in pieces if p is not None])


def test_each_spec_belongs_to_one_parameter() -> None:
    assert sorted(i for p in BY_NAME.values() for i in p.specs) == list(range(len(SPECS)))
    assert (
        "model.layers.0.mlp.experts.w13_weight" in BY_NAME
        and len(BY_NAME["model.layers.0.mlp.experts.w2_weight"].specs) == 4
    )
    assert "model.layers.2.mlp.gate_up_proj.weight" in BY_NAME and "model.layers.3.self_attn.qkv_proj.weight" in BY_NAME


def test_more_ranks_than_key_heads_share_them() -> None:
    q, k, v = (WHOLE[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    for rank in range(4):
        expected = torch.cat([q[4 * rank : 4 * rank + 4], *(t[2 * (rank // 2) : 2 * (rank // 2) + 2] for t in (k, v))])
        assert torch.equal(on_rank("model.layers.1.self_attn.qkv_proj.weight", ServerLayout(4), rank), expected)


def test_experts_are_cut_or_spread_and_gate_comes_before_up() -> None:
    def expert(e: int, x: str) -> Tensor:
        return WHOLE[f"model.layers.0.mlp.experts.{e}.{x}_proj.weight"]

    w13, w2 = (f"model.layers.0.mlp.experts.w{x}_weight" for x in ("13", "2"))
    cut = torch.cat([torch.cat([expert(e, "gate")[6:], expert(e, "up")[6:]]) for e in range(4)])
    assert torch.equal(on_rank(w13, ServerLayout(2), 1), cut)
    spread = torch.cat([torch.cat([expert(e, "gate"), expert(e, "up")]) for e in (2, 3)])
    assert torch.equal(on_rank(w13, ServerLayout(2, expert=2), 1), spread)
    both = torch.cat([expert(e, "down")[:, 6:] for e in (2, 3)])
    assert torch.equal(on_rank(w2, ServerLayout(4, expert=2), 3), both)


def test_a_cpus_mlp_and_the_vocabulary_are_filled_up_with_zeros() -> None:
    padded = on_rank("model.layers.2.mlp.gate_up_proj.weight", ServerLayout(2, mlp_multiple=5), 1)
    gate, up = (WHOLE[f"model.layers.2.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    zeros = torch.zeros(4, 8)  # 16 rows become 2 × 10
    assert torch.equal(padded, torch.cat([gate[10:], zeros, up[10:], zeros]))
    rows = on_rank("lm_head.weight", ServerLayout(2), 1)  # 70 rows become 128
    assert torch.equal(rows, torch.cat([WHOLE["lm_head.weight"][64:], torch.zeros(58, 8)]))


def test_mixtrals_own_names_of_experts() -> None:
    config = {"num_local_experts": 4, "intermediate_size": 12, "sliding_window": None, "mlp_only_layers": None}
    specs, fields = model(model_type="mixtral", **config)
    by_name = {p.name: p for p in server_parameters(specs)}
    prefix = "model.layers.1.block_sparse_moe."
    assert {n for n in by_name if n.startswith(prefix)} == {
        f"{prefix}{x}" for x in ("gate.weight", "experts.w13_weight", "experts.w2_weight")
    }
    [down] = [specs[i] for i in by_name[f"{prefix}experts.w2_weight"].specs if specs[i].expert == 3]
    assert down.hf == (f"{prefix}experts.3.w2.weight",)
    whole = torch.arange(96.0).view(8, 12)
    piece = server_piece(down, [whole], ServerLayout(2), 1, num_experts=fields.num_experts)
    assert piece is not None and torch.equal(piece, whole[:, 6:])
    [gate_up] = [specs[i] for i in by_name[f"{prefix}experts.w13_weight"].specs if specs[i].expert == 3]
    pair = [torch.arange(96.0).view(12, 8), -torch.arange(96.0).view(12, 8)]
    piece = server_piece(gate_up, pair, ServerLayout(2), 1, num_experts=fields.num_experts)
    assert piece is not None and torch.equal(piece, torch.cat([pair[0][6:], pair[1][6:]]))


def test_experts_must_divide_the_ranks() -> None:
    with pytest.raises(UserError, match="ep_size"):
        ServerLayout(tensor=2, expert=4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [{}, {"tensor": 2}, {"pipeline": 2}, {"data": 4, "expert": 4}, {"tensor": 2, "pipeline": 2, "data": 2}]
    ),
    st.sampled_from([64, 1500, 10**6]),
    st.lists(st.sampled_from(sorted(BY_NAME)), min_size=1, unique=True),
)
def test_each_checked_parameter_comes_to_one_rank_in_its_order(
    degrees: dict[str, int], bucket_bytes: int, names: list[str]
) -> None:
    layout = ParallelLayout(**degrees)
    sent = plan_reshard(
        SPECS,
        layout,
        num_layers=4,
        num_experts=4,
        feeds=[range(layout.world_size)],
        dtype=torch.float32,
        bucket_bytes=bucket_bytes,
    )
    made = plan_check(sent, [BY_NAME[name] for name in names])
    order: dict[int, list[int]] = {}
    for step in made.steps:
        for bucket in step.buckets:
            order.setdefault(bucket.sender, []).extend(bucket.specs)
            assert len({name for name in names if set(bucket.specs) <= set(BY_NAME[name].specs)}) == 1
            assert len(bucket.specs) == 1 or bucket.nbytes <= made.bucket_bytes
            arrivals = {
                (m.spec, m.shard) for m in step.moves if m.destination == bucket.sender and m.spec in bucket.specs
            }
            assert arrivals == {(i, s) for i in bucket.specs for s in range(SPECS[i].num_shards(layout))}
    padding = 2 * 4 * 8 * 4  # rows of the vocabulary, in every shard of a step
    assert all(made.peak_bytes(r) <= 2 * made.bucket_bytes + padding for r in range(layout.world_size))
    everything = [i for specs in order.values() for i in specs]
    assert sorted(everything) == sorted(i for name in names for i in BY_NAME[name].specs)
    for name in names:
        [rank] = {rank for rank, specs in order.items() if set(BY_NAME[name].specs) & set(specs)}
        assert [i for i in order[rank] if i in BY_NAME[name].specs] == list(BY_NAME[name].specs)


def test_the_owner_of_what_all_others_check_needs_no_more_than_two_buckets() -> None:
    """Every rank starts with expert 0 of another layer, and one rank has them all."""
    specs, fields = model(num_hidden_layers=16, mlp_only_layers=[], vocab_size=8)
    layout = ParallelLayout(data=4, expert=4)
    sent = plan_reshard(
        specs, layout, num_layers=16, num_experts=4, feeds=[range(4)], dtype=torch.float32, bucket_bytes=800
    )
    made = plan_check(sent, [p for p in server_parameters(specs) if "experts.w13" in p.name])
    assert made.bucket_bytes < 1600 and fields.num_experts == 4
    assert all(made.peak_bytes(rank) <= 2 * made.bucket_bytes for rank in range(4))
