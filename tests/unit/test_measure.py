"""The arithmetic of `measure`: rounding to FP8, flipping experts."""

from __future__ import annotations

import torch

from gspo_megatron.measure import flip_experts, to_fp8


def test_fp8_keeps_each_rows_maximum_and_three_bits_of_mantissa() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 16)[:, None]
    rounded = to_fp8(weight)
    assert torch.allclose(rounded.abs().amax(1), weight.abs().amax(1), rtol=1e-6)
    large = weight.abs() > weight.abs().amax(1, keepdim=True) / 1000  # no subnormals
    error = ((rounded - weight) / weight)[large].abs()
    assert 1 / 32 < error.max() <= 1 / 16 + 1e-6, "half of the spacing of three bits"
    assert torch.equal(to_fp8(rounded), rounded)
    assert to_fp8(torch.zeros(2, 2)).eq(0).all()


def test_a_flip_replaces_one_expert_by_one_that_was_not_chosen() -> None:
    generator = torch.Generator().manual_seed(1)
    experts = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(3000)]).short().view(1000, 3, 2)
    for share in (0.0, 0.1, 1.0):
        flipped = flip_experts(experts, share, 8, generator)
        assert flipped.dtype == experts.dtype and (flipped.sort(-1).values.diff(dim=-1) > 0).all(), "a set of two"
        kept = (flipped[..., :, None] == experts[..., None, :]).any(-1).sum(-1)  # members that stayed
        is_flipped = kept < 2
        assert (kept[is_flipped] == 1).all()
        assert abs(float(is_flipped.float().mean()) - share) < 0.02
    assert torch.equal(flip_experts(experts, 0.0, 8, generator), experts)
