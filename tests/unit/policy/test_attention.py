"""Attention over a pack is attention within each sequence; the plan of each context-parallel rank, in one process."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.policy import attention
from gspo_megatron.policy.attention import (
    AttentionPlan,
    PackedAttention,
    Rotate,
    attend,
    core_attention,
    packed_sequences,
    plan_attention,
    uses_flash,
)
from gspo_megatron.policy.cpu_adaptation import adapt
from tests.distributed.attention_cases import dense_gradients, held_by, offsets, random_qkv

SCALE = 0.4
HEADS = [(4, 2), (3, 3), (6, 1)]  # query heads, key groups


def plans(lengths: list[int], size: int) -> list[AttentionPlan]:
    local = [length // size for length in lengths]
    return [
        plan_attention(offsets(local), max(local), sum(local), context_rank=rank, context_size=size)
        for rank in range(size)
    ]


def cp_group(rank: int, size: int) -> Any:
    """What Megatron's rotation asks of the context-parallel group."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def by_rank(qkv: list[Tensor], lengths: list[int], size: int) -> list[Tensor]:
    """Output and gradients of q, k, v with each rank's share computed by its own plan, in the pack's order."""
    *inputs, upstream = qkv
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    held = [held_by(rank, size, lengths) for rank in range(size)]
    gathered_key, gathered_value = key[torch.cat(held)], value[torch.cat(held)]
    out = torch.zeros_like(upstream)
    for mine, plan in zip(held, plans(lengths, size), strict=True):
        index = slice(None) if plan.key_index is None else plan.key_index
        share = attend(query[mine], gathered_key[index], gathered_value[index], plan, scale=SCALE)
        out = out.index_copy(0, mine, share)
    return [out.detach(), *torch.autograd.grad(out, [query, key, value], upstream)]


def assert_close(ours: list[Tensor], truth: list[Tensor]) -> None:
    for name, x, y in zip(["out", "query", "key", "value"], ours, truth, strict=True):
        assert (x - y).abs().max() <= 1e-12, name


# --- against the definition --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 11), min_size=1, max_size=6), heads=st.sampled_from(HEADS))
def test_a_pack_of_any_lengths(lengths: list[int], heads: tuple[int, int]) -> None:
    qkv = random_qkv(lengths, *heads, head_dim=4)
    assert_close(by_rank(qkv, lengths, 1), dense_gradients(qkv, lengths, SCALE))


@settings(deadline=None, max_examples=40)
@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    size=st.sampled_from([2, 3, 4]),
    heads=st.sampled_from(HEADS),
)
def test_the_ranks_of_a_context_parallel_group(chunks: list[int], size: int, heads: tuple[int, int]) -> None:
    lengths = [2 * size * chunk for chunk in chunks]
    qkv = random_qkv(lengths, *heads, head_dim=4)
    assert_close(by_rank(qkv, lengths, size), dense_gradients(qkv, lengths, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    lengths = [70, 3, 200, 1]
    *inputs, _ = (x.to(dtype) for x in random_qkv(lengths, 4, 2, 8))
    [pack] = plans(lengths, 1)
    together = attend(*inputs, pack, scale=SCALE).split(lengths)
    for length, out, *own in zip(lengths, together, *(x.split(lengths) for x in inputs), strict=True):
        [alone] = plans([length], 1)
        assert torch.equal(out, attend(*own, alone, scale=SCALE))


# --- rotary embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "size"), [([5, 1, 9, 2], 1), ([8, 4, 20], 2), ([8, 24, 16], 4)])
def test_rotation_is_megatrons_to_the_bit(lengths: list[int], size: int, dtype: torch.dtype) -> None:
    local = [length // size for length in lengths]
    rotary = RotaryEmbedding(8, 1.0, rotary_base=100, use_cpu_initialization=True, cp_group=cp_group(0, 1))
    angles = rotary.get_freqs_non_repeated(64).repeat(1, 2)[:, None, None]
    for rank in range(size):
        packed = packed_sequences(offsets(local), max(local), context_rank=rank, context_size=size)
        packed.rotary_angles = angles
        ours, theirs = (
            torch.randn(sum(local), 4, 8, generator=torch.Generator().manual_seed(rank), dtype=dtype).requires_grad_()
            for _ in range(2)
        )
        rotated = Rotate.apply(ours, *packed.rotation(sum(local), dtype))
        truth = apply_rotary_pos_emb(
            theirs, angles, module().config, packed.cu_seqlens_q, cp_group=cp_group(rank, size)
        )
        assert torch.equal(rotated, truth) and not torch.equal(rotated, ours)
        upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9), dtype=dtype)
        rotated.backward(upstream), truth.backward(upstream)
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_the_module_rotates_queries_and_keys() -> None:
    lengths = [5, 1, 8]
    query, key, value, _ = (x.float() for x in random_qkv(lengths, 4, 2, 4))
    packed, plain = (packed_sequences(offsets(lengths), 8, context_rank=0, context_size=1) for _ in range(2))
    packed.rotary_angles = torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 1, 2)
    turned = [Rotate.apply(x, *packed.rotation(14, x.dtype)) for x in (query, key)]
    ours = module()(query, key, value, None, packed_seq_params=packed)
    assert torch.equal(ours, module()(*turned, value, None, packed_seq_params=plain))
    assert not torch.equal(ours, module()(query, key, value, None, packed_seq_params=plain))


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_of_a_small_pack() -> None:
    """Two sequences of 4 and 8 tokens over two ranks: 0 3 | 0 1 6 7 on the first, 1 2 | 2 3 4 5 on the second."""
    first, second = plans([4, 8], 2)
    assert first.cu_seqlens_query.tolist() == second.cu_seqlens_query.tolist() == [0, 1, 2, 4, 6]
    assert first.cu_seqlens_key.tolist() == [0, 1, 5, 7, 15]
    assert second.cu_seqlens_key.tolist() == [0, 2, 5, 9, 15]
    assert (first.longest_query, first.longest_key) == (2, 8)
    assert (second.longest_query, second.longest_key) == (2, 6)
    assert first.key_index is not None and second.key_index is not None
    long = [2, 3, 8, 9, 10, 11, 4, 5]  # where the long sequence's tokens lie in the 6 + 6 gathered ones
    assert first.key_index.tolist() == [0] + [0, 6, 7, 1] + long[:2] + long
    assert second.key_index.tolist() == [0, 6] + [0, 6, 7] + long[:4] + long[:6]
    assert first.positions.tolist() == [0, 3, 0, 1, 6, 7]
    assert second.positions.tolist() == [1, 2, 2, 3, 4, 5]
    assert second.segment_lengths == ([1, 1, 2, 2], [2, 3, 4, 6])


def test_ranks_have_the_same_work() -> None:
    """That is what the zigzag is for: query-key pairs are equal in number."""
    pairs = []
    for plan in plans([24, 8, 48], 4):
        queries, keys = plan.cu_seqlens_query.diff(), plan.cu_seqlens_key.diff()
        pairs.append(int((queries * (keys - queries) + queries * (queries + 1) // 2).sum()))
    assert len(set(pairs)) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_planning_reads_nothing_back_from_the_device(size: int) -> None:
    """A meta tensor has no value to read."""
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    plan = plan_attention(cu_seqlens, 8, 20, context_rank=size - 1, context_size=size)
    assert plan.positions.shape == (20,)
    assert plan.cu_seqlens_query.dtype == plan.cu_seqlens_key.dtype == torch.int32
    if size == 2:
        assert plan.key_index is not None and plan.key_index.shape == (50,)
    packed = packed_sequences(cu_seqlens, 8, context_rank=0, context_size=size)
    packed.rotary_angles = torch.zeros(8 * size, 1, 1, 4, device="meta")
    assert [x.shape for x in packed.rotation(20, torch.float32)] == [(20, 1, 4)] * 2


def test_what_megatron_reads() -> None:
    packed = packed_sequences(offsets([4, 6]), 6, context_rank=1, context_size=2)
    assert isinstance(packed, PackedSeqParams) and packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 8, 20]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 12
    assert packed.cp_group is None and packed.local_cp_size is None
    assert packed.cu_seqlens_q_padded is None and packed.cu_seqlens_kv_padded is None


def test_a_micro_batch_is_planned_once() -> None:
    packed = packed_sequences(offsets([4, 6]), 6, context_rank=1, context_size=2)
    plan = packed.plan(10)
    packed.rotary_angles = torch.rand(12, 1, 1, 4)
    assert packed.plan(10) is plan and plan.segment_lengths is plan.segment_lengths
    assert packed.rotation(10, torch.float32) is packed.rotation(10, torch.float32)
    with pytest.raises(AssertionError, match="planned for 10 tokens, given 12"):
        packed.plan(12)


# --- the module --------------------------------------------------------------------------------------------------


def module(**changes: Any) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        **({"attention_dropout": 0.0} | changes),
    )
    alone = SimpleNamespace(cp=None)  # without context parallelism the group is never asked
    return PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=SCALE, pg_collection=alone)


def test_recomputing_the_core_changes_nothing_and_keeps_the_plan() -> None:
    """As Megatron's attention does with recompute_modules=["core_attn"]: no graph forward, again backward."""
    adapt()
    lengths = [5, 1, 8]
    *inputs, upstream = random_qkv(lengths, 4, 2, 4)
    core = module()
    modes: list[bool] = []
    core.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    packed = packed_sequences(offsets(lengths), max(lengths), context_rank=0, context_size=1)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(query, key, value, None, packed_seq_params=packed)

    leaves = [x.requires_grad_() for x in inputs]
    out = tensor_parallel.checkpoint(run, False, *leaves)
    first_plan = packed.plan(14)
    out.backward(upstream.flatten(1))
    assert modes == [False, True]
    assert packed.plan(14) is first_plan
    ours = [out.detach().view_as(upstream), *(x.grad for x in leaves)]
    assert_close(ours, dense_gradients([*inputs, upstream], lengths, SCALE))


def test_the_default_scale_is_of_the_head() -> None:
    config = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None,
        apply_query_key_layer_scaling=False,
        rotary_interleaved=False,
        no_rope_freq=None,
        multi_latent_attention=False,
        kv_channels=16,
    )
    core = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=None))
    assert core.scale == 0.25


def test_settings_it_does_not_compute_are_refused() -> None:
    with pytest.raises(AssertionError):
        module(attention_dropout=0.1)
    with pytest.raises(AssertionError):
        module(window_size=(4, 0))
    with pytest.raises(AssertionError):
        module(rotary_interleaved=True)


def test_kinds_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_attention("torch") is PackedAttention
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    with pytest.raises(UserError, match=r'not installed; install it or set model\.attention="torch"'):
        core_attention("transformer_engine")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    assert core_attention("transformer_engine") is transformer_engine.TEDotProductAttention
    with pytest.raises(UserError, match=r"'flash'; use one of torch, transformer_engine"):
        core_attention("flash")


# --- the variable-length kernel ----------------------------------------------------------------------------------


def on_cuda(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> Any:
    """What the rule looks at of a tensor."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=(7, 4, head_dim), device=torch.device("cuda", 0))


def test_when_the_variable_length_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert uses_flash(on_cuda()) and uses_flash(on_cuda(torch.float16, 256))
    assert not uses_flash(torch.zeros(7, 4, 128, dtype=torch.bfloat16))
    for dtype, head_dim in [(torch.float32, 128), (torch.float64, 128), (torch.bfloat16, 20), (torch.bfloat16, 264)]:
        assert not uses_flash(on_cuda(dtype, head_dim))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not uses_flash(on_cuda())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not uses_flash(on_cuda())


def kernel(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any):
    """What torch documents of varlen_attn, with the demands of the flash kernel behind it."""
    inspect.signature(attention._find_varlen_attn()).bind(query, key, value, cu_q, cu_k, max_q, max_k, **how)
    assert how["window_size"] == (-1, 0) and how["enable_gqa"] == (query.shape[1] != key.shape[1])
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert cu_q[-1] == len(query) and cu_k[-1] == len(key) == len(value)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out = []
    parts = [x.split(c.diff().tolist()) for x, c in ((query, cu_q), (key, cu_k), (value, cu_k))]
    for q, k, v in zip(*parts, strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * how["scale"]
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.mark.skipif(attention._find_varlen_attn() is None, reason="this torch has no varlen_attn to bind to")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("lengths", "size"), [([5, 1, 9, 2], 1), ([8, 4, 20], 2), ([8, 24, 16], 4)])
def test_what_the_kernel_is_given(
    lengths: list[int], size: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "uses_flash", lambda query: True)
    monkeypatch.setattr(attention, "_varlen_attn", kernel)
    qkv = random_qkv(lengths, *heads, head_dim=8)
    assert_close(by_rank(qkv, lengths, size), dense_gradients(qkv, lengths, SCALE))


@pytest.mark.skipif(attention._find_varlen_attn() is None, reason="this torch has no varlen_attn to bind to")
def test_values_narrower_than_keys_reach_the_kernel_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in latent attention; the kernel takes them of one width only."""
    query, key, value, _ = random_qkv([5, 1, 9], 4, 2, head_dim=8)
    [plan] = plans([5, 1, 9], 1)
    expected = attend(query, key, value[..., :5], plan, scale=SCALE)
    monkeypatch.setattr(attention, "uses_flash", lambda query: True)
    widths = []
    monkeypatch.setattr(
        attention, "_varlen_attn", lambda q, k, v, *a, **b: (widths.append(v.shape), kernel(q, k, v, *a, **b))[1]
    )
    out = attend(query, key, value[..., :5], plan, scale=SCALE)
    assert widths == [value.shape] and out.shape == expected.shape == (15, 4, 5)
    torch.testing.assert_close(out, expected)
