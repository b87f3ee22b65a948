"""The arithmetic of `measure`: rounding to FP8, flipping experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.measure import flip_experts, flip_routes, logprobs, own_routes, summarize_precision, to_fp8
from gspo_megatron.stability.benchmark.measurements import measured_names
from gspo_megatron.types import RecordedRoutes


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


class _Policy:
    """Of a policy what `logprobs` and `flip_routes` use. As the real one's, its routers choose other experts once some
    are forced."""

    def __init__(self) -> None:
        self.routing = SimpleNamespace(mode="r3")
        self.fields = SimpleNamespace(num_experts=8)
        self.groups = SimpleNamespace(layout=SimpleNamespace(world_size=1), rank=0)
        self.device = torch.device("cpu")
        self.forced: list[Tensor] = []  # [T, layers, k] experts of every forced pass

    def fill_old_logprobs(self, batches: list[Any], *, record_routes: bool, replay: bool) -> None:
        for micro in batches[0].micro_batches:
            micro.old_logprobs = torch.zeros(400)
            if replay:
                self.forced.append(micro.routes)
            experts = torch.full((400, 3, 2), 6 if replay else 0, dtype=torch.int16)
            experts[..., 1] += 1
            is_real = torch.ones(400, dtype=torch.bool)
            told = RecordedRoutes((0, 1, 2), 0, is_real, experts, torch.zeros(3), torch.zeros(3, 8))
            micro.recorded = told if record_routes else None


def test_every_share_is_flipped_of_the_own_routes_and_not_of_those_under_the_last_flips() -> None:
    count = 400
    micro: Any = SimpleNamespace(
        cu_seqlens=torch.tensor([0, count]),
        sequence_ids=torch.tensor([0]),
        response_mask=torch.ones(count, dtype=torch.bool),
        rollout_logprobs=torch.zeros(count),
    )
    policy: Any = _Policy()
    job: Any = SimpleNamespace(groups=SimpleNamespace(reports_loss=True), all_gather=lambda value: [value])
    batches: Any = [SimpleNamespace(micro_batches=[micro])]
    logprobs(policy, job, batches)
    own = own_routes(batches)
    for share in (0.0, 0.1, 0.3):
        flip_routes(policy, batches, own, share, seed=1)
        logprobs(policy, job, batches, forced=True)
        differs = (policy.forced[-1].sort(-1).values != own[0].experts.sort(-1).values).any(-1)
        assert abs(float(differs.float().mean()) - share) < 0.04
    assert float(policy.forced[0].float().mean()) == 0.5, "nothing flipped: the own experts 0 and 1"


def test_what_precision_writes_is_what_a_benchmark_may_name() -> None:
    generator = np.random.default_rng(0)
    values, curves = measured_names("precision")
    kinds = {name.removesuffix("_kl_k1") for name in values if name.endswith("_kl_k1")}
    found = summarize_precision({kind: generator.normal(-1e-3, 0.03, (8, 16)) for kind in sorted(kinds)})
    assert set(found[0]) == values and set(found[1]) == curves
    assert {"engine", "fp8", "bf16", "flip_0.1", "noise_0.03", "bias_0.001", "mismatch_0.0015"} <= kinds
