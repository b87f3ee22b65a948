"""What each rank does in the tests of attention, and the definition they compare with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.groups import ProcessGroups
from gspo_megatron.policy.attention import (
    GatherKeys,
    PackedAttention,
    PackedSequences,
    core_attention,
    packed_sequences,
    plan_attention,
)
from tests.distributed.cases import join

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
HIDDEN = HEADS * HEAD_DIM


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The definition: one softmax over the whole pack, masked to what is earlier in the same sequence.

    query [T, heads, head_dim], key and value [T, groups, head_dim] in the sequences' own order, float64.
    """
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (token[:, None] >= token)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def held_by(rank: int, size: int, lengths: list[int]) -> Tensor:
    """Tokens of the pack that a context-parallel rank holds, in its order."""
    if size == 1:
        return torch.arange(sum(lengths))
    held, start = [], 0
    for length in lengths:
        chunks = list(torch.arange(start, start + length).chunk(2 * size))
        held += [chunks[rank], chunks[2 * size - 1 - rank]]
        start += length
    return torch.cat(held)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_qkv(lengths: list[int], heads: int, groups: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, of the whole pack. [T, ·, head_dim] float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), n, head_dim) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense_gradients(qkv: list[Tensor], lengths: list[int], scale: float) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, by the definition."""
    *inputs, upstream = qkv
    leaves = [x.double().requires_grad_() for x in inputs]
    out = dense(*leaves, lengths, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.double())]


def _config(context: int, **recompute: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        context_parallel_size=context,
        **recompute,
    )


def _share(groups: ProcessGroups, lengths: list[int]) -> tuple[Tensor, PackedSequences]:
    size = groups.cp.size()
    local = [length // size for length in lengths]
    packed = packed_sequences(offsets(local), max(local), context_rank=groups.cp.rank(), context_size=size)
    return held_by(groups.cp.rank(), size, lengths), packed


def attention(layout: dict[str, int], lengths: list[int], num_real: list[int] | None = None) -> dict[str, Any]:
    """PackedAttention over this rank's share in float32. Tokens behind num_real of a sequence are padding:
    a rank that holds nothing else goes backward from zero times its output."""
    groups = join(layout)
    held, packed = _share(groups, lengths)
    *inputs, upstream = (x[held].float() for x in random_qkv(lengths, HEADS, GROUPS, HEAD_DIM))
    collection = SimpleNamespace(cp=groups.cp)
    module = PackedAttention(_config(groups.cp.size()), 1, AttnMaskType.causal, "self", pg_collection=collection)
    leaves = [x.requires_grad_() for x in inputs]
    out = module(*leaves, None, packed_seq_params=packed)
    real = real_tokens(lengths, num_real or lengths)[held]
    if real.any():
        (out * (upstream * real[:, None, None]).flatten(1)).sum().backward()
    else:
        (out * 0).sum().backward()
    results = [out.detach().view(-1, HEADS, HEAD_DIM), *(x.grad for x in leaves)]
    return {"held": held, "results": results, "num_real": int(real.sum())}


def real_tokens(lengths: list[int], num_real: list[int]) -> Tensor:
    """[T] bool"""
    return torch.cat([torch.arange(length) < n for length, n in zip(lengths, num_real, strict=True)])


def bf16_gradient_sum(layout: dict[str, int]) -> list[float]:
    """The gradients of this rank's two keys, of a sequence of four, from segments that give each key ½, but
    rank 0's front segment 256: to token 0, which all four segments see."""
    groups = join(layout)
    rank = groups.cp.rank()
    plan = plan_attention(offsets([2]), 2, 2, context_rank=rank, context_size=2)
    key = torch.zeros(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    keys, _ = GatherKeys.apply(key, key.detach(), plan.key_index, groups.cp)
    gradient = torch.full_like(keys, 0.5)
    if rank == 0:
        gradient[0] = 256  # its front segment sees one key
    keys.backward(gradient)
    assert key.grad is not None and key.grad.dtype == torch.bfloat16
    return key.grad.flatten().tolist()


def self_attention(layout: dict[str, int], lengths: list[int], recompute: bool) -> dict[str, Any]:
    """Megatron's attention layer around ours: projections, rotary embeddings, selective recomputation."""
    groups = join(layout)
    held, packed = _share(groups, lengths)
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]} if recompute else {}
    collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    layer = SelfAttention(
        _config(groups.cp.size(), **selective),
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=core_attention("torch")),
            linear_proj=RowParallelLinear,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        pg_collection=collection,
    )
    calls: list[bool] = []
    layer.core_attention.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    hidden, upstream = torch.randn(2, sum(lengths), 1, HIDDEN, generator=generator)
    hidden = hidden[held].requires_grad_()
    rotary = RotaryEmbedding(HEAD_DIM, 1.0, use_cpu_initialization=True, cp_group=groups.cp)
    frequencies = rotary(rotary.get_rotary_seq_len(None, None, hidden, layer.config, packed), packed_seq=True)
    out, _ = layer(hidden, None, rotary_pos_emb=frequencies, packed_seq_params=packed)
    out.backward(upstream[held])
    assert hidden.grad is not None
    weights = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"held": held, "results": [out.detach(), hidden.grad], "weights": weights, "calls": calls}
