"""The variable-length kernel on a CUDA device, against the definition in float64 on the same rounded inputs."""

from __future__ import annotations

import pytest
import torch

from gspo_megatron.policy.attention import attend, plan_attention, uses_flash
from tests.distributed.attention_cases import dense_gradients, held_by, offsets, random_qkv

pytestmark = pytest.mark.gpu
CASES = [
    ([300, 1, 37, 128, 2], 1),
    ([1, 1, 1], 1),  # queries of one token, where the kernel could drop its causal mask
    ([256, 8, 40], 2),
    ([4, 4], 2),  # chunks of one token
    ([512, 24, 8, 64], 4),
]


@pytest.mark.parametrize(("lengths", "size"), CASES)
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 128), (4, 4, 64), (4, 1, 256), (6, 3, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_and_gradients_equal_the_definition(
    dtype: torch.dtype, heads: int, groups: int, head_dim: int, lengths: list[int], size: int
) -> None:
    scale = head_dim**-0.5
    rounded = [x.cuda().to(dtype) for x in random_qkv(lengths, heads, groups, head_dim)]
    truth = dense_gradients([x.double().cpu() for x in rounded], lengths, scale)
    query, key, value = (x.clone().requires_grad_() for x in rounded[:3])
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert uses_flash(query) == (capable and dtype != torch.float32)

    # Every rank of the context-parallel group, one after the other; the gather is an index.
    held = [held_by(rank, size, lengths).cuda() for rank in range(size)]
    local = [length // size for length in lengths]
    cu_seqlens = offsets(local).cuda()
    out = torch.zeros_like(rounded[3])
    for rank in range(size):
        plan = plan_attention(cu_seqlens, max(local), sum(local), context_rank=rank, context_size=size)
        keys, values = key[torch.cat(held)], value[torch.cat(held)]
        if plan.key_index is not None:
            keys, values = keys[plan.key_index], values[plan.key_index]
        out = out.index_copy(0, held[rank], attend(query[held[rank]], keys, values, plan, scale=scale))
    ours = [out.detach(), *torch.autograd.grad(out, [query, key, value], rounded[3])]

    # Weights and outputs are rounded to 8 (bfloat16) or 11 bits, relatively; a mask off by one token is off by
    # tenths. Gradients of queries and keys can vanish (one key: its weight is 1): then rounding is all there is,
    # which is measured against the values' and the output's gradients that it comes from.
    epsilon = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    size_of_rounding = rounded[3].double().norm().item() * scale
    for name, x, y in zip(["out", "query", "key", "value"], ours, truth, strict=True):
        assert torch.isfinite(x).all(), name
        floor = size_of_rounding if name in ("query", "key") else 0.0
        assert (x.double().cpu() - y).norm() <= 2 * epsilon * max(y.norm().item(), floor), name


def test_no_length_is_read_back_from_the_device() -> None:
    cu_seqlens = offsets([8, 4, 20]).cuda()
    query, key, value, _ = (x.cuda().bfloat16() for x in random_qkv([8, 4, 20], 4, 2, 64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = plan_attention(cu_seqlens, 20, 32, context_rank=0, context_size=2)
        assert plan.key_index is not None
        index = plan.key_index % 32
        attend(query, key[index], value[index], plan, scale=0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")
