"""The routers' losses in one process, rank by rank, in float64, against the definition."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.config import ModelConfig
from gspo_megatron.data.micro_batch import context_share, pack
from gspo_megatron.errors import UserError
from gspo_megatron.policy.router import AddLoss, Router, RouterInputs, RouterLosses
from gspo_megatron.types import MicroBatch, Sequence
from tests.distributed.router_cases import plain_losses
from tests.unit.policy.experts_cases import FakeGroup

EXPERTS, TOP_K, N = 6, 2, 5
LOSSES = RouterLosses(aux=0.3, z=0.07)


class CountingRouter(Router):
    """Keeps its own token counts, and takes those over all ranks from the test."""

    own: Tensor
    over_all_ranks: Tensor | None = None

    def _over_sequences(self, sums: Tensor) -> Tensor:
        self.own = sums.clone()
        return sums if self.over_all_ranks is None else self.over_all_ranks


def make_router(losses: RouterLosses = LOSSES, tensor: int = 1, rank: int = 0, **config: Any) -> CountingRouter:
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        add_bias_linear=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        **config,
    )
    groups = SimpleNamespace(tp=FakeGroup(tensor, rank), cp=FakeGroup(), tp_cp=FakeGroup(tensor), tp_dp_cp=FakeGroup())
    return CountingRouter(settings, groups, losses=losses)  # type: ignore[arg-type]


def make_pack(lengths: list[int], **layout: int) -> MicroBatch:
    sequences = [
        Sequence(i, torch.arange(n), torch.arange(n) > 0, torch.zeros(n), torch.tensor(1.0))
        for i, n in enumerate(lengths)
    ]
    return pack(sequences, pad_token_id=0, device=torch.device("cpu"), **layout)


def chosen_of(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(TOP_K, 1).indices, True)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    context=st.sampled_from([1, 2, 3]),
    tensor=st.sampled_from([1, 2, 4]),
)
def test_the_ranks_shares_add_up_to_the_definition(lengths: list[int], context: int, tensor: int) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    packs = [
        make_pack(lengths, tensor_parallel=tensor, context_parallel=context, context_rank=c) for c in range(context)
    ]
    padded = [int(n) * context for n in packs[0].cu_seqlens.diff()]
    logits = torch.randn(sum(padded), EXPERTS, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    starts = torch.tensor([0, *padded]).cumsum(0)
    real = [start + torch.arange(n) for start, n in zip(starts.tolist(), lengths, strict=False)]
    aux, z = plain_losses(logits, chosen_of(logits), real, N)
    [expected] = torch.autograd.grad(LOSSES.aux * aux + LOSSES.z * z, logits)

    ranks = []  # of each (context, tensor): its router, its tokens' places in the pack, their logits, its inputs
    for c, micro in enumerate(packs):
        mine = context_share(padded, context_parallel=context, context_rank=c)
        for t, places in enumerate(mine.chunk(tensor)):
            router = make_router(tensor=tensor, rank=t)
            ranks.append((router, places, logits.detach()[places].requires_grad_(), RouterInputs(micro, N)))
    for router, _, own, inputs in ranks:
        router._loss(own, chosen_of(own), inputs)
    counts = torch.stack([router.own for router, *_ in ranks]).sum(0)
    total = torch.zeros(2, dtype=torch.float64)
    for router, places, own, inputs in ranks:
        router.observed, router.over_all_ranks = None, counts
        weights, chosen = router.routing(own[:, None], inputs)
        assert torch.equal(chosen, chosen_of(own))
        (weights * 0).sum().backward()
        assert own.grad is not None and router.observed is not None
        torch.testing.assert_close(own.grad, expected[places], rtol=1e-10, atol=1e-14)
        total += router.observed
    torch.testing.assert_close(total, torch.stack([aux, z]).detach(), rtol=1e-10, atol=1e-14)


def test_an_even_load_gives_one() -> None:
    """Each expert is chosen as often as any other, with even probabilities: the smallest value there is."""
    router, micro = make_router(), make_pack([EXPERTS])
    chosen = torch.eye(EXPERTS, dtype=torch.bool) | torch.eye(EXPERTS, dtype=torch.bool).roll(1, 0)
    router._loss(torch.zeros(EXPERTS, EXPERTS), chosen, RouterInputs(micro, 1))
    assert router.observed is not None
    assert router.observed.tolist() == pytest.approx([1.0, torch.tensor(EXPERTS).log().item() ** 2], rel=1e-6)


def test_a_sigmoid_routers_scores_are_divided_by_their_sum() -> None:
    """As in DeepSeek-V3's own definition; one sequence, written out."""
    router, micro = make_router(RouterLosses(aux=1.0), moe_router_score_function="sigmoid"), make_pack([7])
    logits = torch.randn(7, EXPERTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chosen = chosen_of(logits)
    router._loss(logits, chosen, RouterInputs(micro, 1))
    scores = logits.sigmoid()
    load = chosen.double().sum(0) * EXPERTS / (TOP_K * 7)
    expected = (load * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    assert router.observed is not None
    assert float(router.observed[0]) == pytest.approx(float(expected), rel=1e-12)
    assert abs(float((load * logits.softmax(-1).mean(0)).sum() - expected)) > 1e-3, "the case must tell the two apart"


def test_routing_itself_is_megatrons() -> None:
    logits, micro = torch.randn(9, 1, EXPERTS, requires_grad=True), make_pack([9])
    on, off = make_router(), make_router(RouterLosses(0.0, 0.0))
    ours, megatrons = on.routing(logits, RouterInputs(micro, N)), off.routing(logits, None)
    assert torch.equal(ours[0], megatrons[0]) and torch.equal(ours[1], megatrons[1])


@pytest.mark.parametrize("num_sequences", [N, None])
def test_without_a_gradient_nothing_is_computed(num_sequences: int | None) -> None:
    router, inputs = make_router(), RouterInputs(make_pack([4]), num_sequences)
    with torch.no_grad():
        router.routing(torch.randn(4, 1, EXPERTS), inputs)
    assert router.observed is None and "sequence" not in vars(inputs)


def test_values_add_up_over_micro_batches() -> None:
    router, inputs, logits = make_router(), RouterInputs(make_pack([4]), N), torch.randn(4, EXPERTS)
    router._loss(logits, chosen_of(logits), inputs)
    assert router.observed is not None
    once = router.observed.clone()
    router._loss(logits, chosen_of(logits), inputs)
    assert torch.equal(router.observed, 2 * once)


def test_which_tokens_are_whose() -> None:
    """Two sequences of 5 and 3 tokens over two context ranks, padded to 8 and 4, and 4 tokens of padding behind."""
    first, second = (make_pack([5, 3], tensor_parallel=8, context_parallel=2, context_rank=rank) for rank in (0, 1))
    assert first.lengths.tolist() == second.lengths.tolist() == [5, 3, 0]
    assert RouterInputs(first, N).sequence.tolist() == [0, 0, 3, 3, 1, 3, 3, 3]
    assert RouterInputs(second, N).sequence.tolist() == [0, 0, 0, 3, 1, 1, 3, 3]


def test_planning_reads_nothing_back_from_the_device() -> None:
    """A meta tensor has no value to read."""
    micro = make_pack([5, 3])
    meta = replace(micro, **{n: getattr(micro, n).to("meta") for n in ("cu_seqlens", "positions", "lengths")})
    assert RouterInputs(meta, N).sequence.shape == (8,)


def test_the_added_loss_has_gradient_one_whatever_happens_to_the_activation() -> None:
    activation, loss = torch.randn(3, requires_grad=True), torch.randn((), dtype=torch.float64, requires_grad=True)
    out = AddLoss.apply(activation, loss)
    assert torch.equal(out, activation)
    (7 * out).sum().backward()
    assert activation.grad is not None and activation.grad.tolist() == [7.0] * 3
    assert loss.grad is not None and loss.grad == 1


@pytest.mark.parametrize("name", ["router_aux_loss", "router_z_loss"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_is_a_number_of_at_least_zero(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"model.{name}={value} must be at least 0"):
        ModelConfig(path="m", **{name: value})  # type: ignore[arg-type]
