"""Sinks and windows by the flash kernel on a CUDA device, against the definition in float64 on the same inputs."""

from __future__ import annotations

import pytest
import torch

from gspo_megatron.policy.attention import plan_attention, uses_flash
from gspo_megatron.policy.sink_attention import FlashWithSinks, attend_with_sinks
from tests.distributed.attention_cases import offsets, random_qkv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 1, 128])
@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (4, 4)])
def test_output_and_gradients_equal_the_definition(heads: int, groups: int, window: int | None) -> None:
    lengths = [300, 1, 37, 128, 2]
    query, key, value, upstream = (x.cuda().bfloat16() for x in random_qkv(lengths, heads, groups, 64))
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    inputs = [x.requires_grad_() for x in (query, key, value, sinks)]
    if not uses_flash(query):
        pytest.skip("this GPU or torch has no flash attention")
    plan = plan_attention(offsets(lengths).cuda(), max(lengths), sum(lengths), context_rank=0, context_size=1)
    out = FlashWithSinks.apply(*inputs, plan, 0.125, window)
    ours = [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = attend_with_sinks(*wide, plan, scale=0.125, window=window)
    truth = [expected.detach(), *torch.autograd.grad(expected, wide, upstream.double())]
    epsilon, rounding = torch.finfo(torch.bfloat16).eps, upstream.double().norm().item() * 0.125
    for name, x, y in zip(["out", "query", "key", "value", "sinks"], ours, truth, strict=True):
        floor = 0.0 if name in ("out", "value") else rounding
        assert torch.isfinite(x).all(), name
        assert (x.double() - y).norm() <= 3 * epsilon * max(y.norm().item(), floor), name
