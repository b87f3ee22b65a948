"""The traffic formula against cases worked out by hand, and the counter that the layout benchmark holds it to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.traffic import StepWork, Traffic, dense_parameters, expert_parameters, mean, step_traffic
from gspo_megatron.weights.families.base import Family, ModelFields
from gspo_megatron.weights.families.qwen3 import FAMILY as QWEN3
from gspo_megatron.weights.families.qwen3_moe import FAMILY as QWEN3_MOE

ROOT = Path(__file__).parents[2]

DENSE = ModelFields(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=4,
    ffn_hidden_size=6,
    vocab_size=10,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=False,
    initializer_range=0.02,
    qk_layernorm=True,
)
MOE = replace(DENSE, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=3, moe_layers=(0,))
HIDDEN = 20 * 8 * 4  # bytes of 20 tokens' hidden states
WORK = StepWork(tokens=20, micro_batches=3)


def only(traffic: Traffic) -> dict[str, float]:
    return {kind: size for kind, size in asdict(traffic).items() if size}


def test_tensor_parallel_by_hand() -> None:
    [traffic] = step_traffic(DENSE, ParallelLayout(tensor=2), WORK)
    # Half of the hidden states, in attention 5 times, in the MLP 5 times, at the embedding and the head twice each.
    # Maximum and 3 sums per token; two norms of 8, q and k norms of 4, the last norm: all-reduces send n.
    assert only(traffic) == {
        "sequence": HIDDEN / 2 * 14,
        "vocabulary": 20 * 4 * 4,
        "replicated": (2 * 8 + 2 * 4 + 8) * 4,
    }


def test_tensor_parallel_experts_by_hand() -> None:
    [traffic] = step_traffic(MOE, ParallelLayout(tensor=2, expert=2), WORK)
    # 10 tokens a rank, 2 choices each, half of which leave the rank: hidden states 4 times, probabilities twice.
    # 4 experts' counts in int64 from 2 ranks, half of it, before 3 dispatches. The router's 4×8 join the norms.
    assert only(traffic) == {
        "sequence": HIDDEN / 2 * 9,
        "vocabulary": 20 * 4 * 4,
        "experts": 10 * 2 / 2 * (4 * 8 * 4 + 2 * 4),
        "routing": 3 * 4 * 8 * 2 / 2,
        "replicated": (2 * 8 + 2 * 4 + 8 + 4 * 8) * 4,
    }


def test_expert_tensor_parallel_by_hand() -> None:
    layout = ParallelLayout(tensor=2, expert_tensor=2)
    [traffic] = step_traffic(MOE, layout, WORK)
    # 20 choices of each of 2 ranks are gathered, so 20 are sent: dispatch and its scatter in backward with
    # probabilities, combine and its gather without.
    assert traffic.experts == 0
    assert traffic.expert_tensor == 20 * (2 * (8 * 4 + 4) + 2 * 8 * 4)
    [gloo] = step_traffic(MOE, layout, replace(WORK, uneven_reduce_scatter=False))
    assert gloo.expert_tensor == traffic.expert_tensor + 20 * (8 * 4 + 4 + 8 * 4)  # the two scatters twice


def test_data_and_expert_parallel_by_hand() -> None:
    [traffic] = step_traffic(MOE, ParallelLayout(data=2, expert=2), WORK)
    # qkv 24×8, projection 8×8, router 4×8, norms, embedding and head 10×8: half of it sent in float32, and gathered.
    dense = 24 * 8 + 8 * 8 + 4 * 8 + (2 * 8 + 2 * 4 + 8) + 2 * 10 * 8
    assert only(traffic) == {
        "experts": 20 * 2 / 2 * (4 * 8 * 4 + 2 * 4),
        "routing": 3 * 4 * 8 * 2 / 2,
        "gradients": dense * 4 / 2,
        "parameters": dense * 4 / 2,
    }
    [alone] = step_traffic(MOE, ParallelLayout(data=2), replace(WORK, distributed_optimizer=False))
    assert only(alone) == {"gradients": dense * 4, "expert_gradients": 4 * 3 * 8 * 3 * 4}


def test_pipeline_by_hand() -> None:
    model = replace(DENSE, num_layers=8)
    message = HIDDEN + 3 * 24
    plain = step_traffic(model, ParallelLayout(pipeline=4), WORK)
    assert [t.pipeline for t in plain] == [message, 2 * message, 2 * message, message]
    virtual = step_traffic(model, ParallelLayout(pipeline=4, virtual_pipeline=2), WORK)
    assert [t.pipeline for t in virtual] == [3 * message, 4 * message, 4 * message, 3 * message]
    tied = replace(model, tied_embeddings=True)
    assert [t.replicated for t in step_traffic(tied, ParallelLayout(pipeline=4), WORK)] == [320, 0, 0, 320]
    assert mean(plain).pipeline == 1.5 * message


def test_context_by_hand() -> None:
    [traffic] = step_traffic(DENSE, ParallelLayout(context=2), replace(WORK, element_bytes=2))
    # Keys and values of 2 groups of 4: gathered in 2 bytes, their gradients scattered in 4; half of it sent.
    assert traffic.context == 20 * 2 * 2 * 4 * (2 + 4) / 2
    assert traffic.gradients == 2 * traffic.parameters > 0
    [split] = step_traffic(DENSE, ParallelLayout(tensor=2, context=2), WORK)
    [whole] = step_traffic(DENSE, ParallelLayout(tensor=2), WORK)
    assert split.context == 20 * 2 * 1 * 4 * (4 + 4) / 2  # one group a tensor-parallel rank
    assert (split.sequence, split.vocabulary) == (whole.sequence / 2, whole.vocabulary / 2)


def test_recomputation_repeats_the_forward_of_what_is_recomputed() -> None:
    layout = ParallelLayout(tensor=2, context=2, expert=2)
    [plain], [full], [moe], [selective] = (
        step_traffic(MOE, layout, replace(WORK, recompute=recompute))  # type: ignore[arg-type]
        for recompute in ("none", "full", "moe", "selective")
    )
    assert full.sequence == plain.sequence + HIDDEN / 2 / 2 * 2
    assert full.experts == moe.experts == 1.5 * plain.experts
    assert full.context == selective.context == 1.5 * plain.context
    assert (moe.context, selective.experts) == (plain.context, plain.experts)
    assert full.gradients == plain.gradients


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(pipeline=2, virtual_pipeline=2, data=2, expert=2),
    ParallelLayout(tensor=2, data=2, expert=2, expert_tensor=2),
    ParallelLayout(tensor=4, context=2, pipeline=4, expert=8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.describe)
@pytest.mark.parametrize("kind", ["dense", "moe", "mixed", "tied"])
def test_parameters_are_those_of_the_rule_table(layout: ParallelLayout, kind: str) -> None:
    """Every stage's parameters, counted tensor by tensor."""
    shape: dict[str, Any] = {"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 4, "vocab_size": 13}
    shape |= {"ffn_hidden_size": 12}
    experts: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 12}
    layers = {"moe": tuple(range(8)), "mixed": (1, 4, 5)}.get(kind)
    fields = replace(DENSE, **shape, tied_embeddings=kind == "tied")
    family: Family = QWEN3
    if layers is not None:
        fields, family = replace(fields, **experts, moe_layers=layers), QWEN3_MOE
    dense, expert = [0] * layout.pipeline, [0] * layout.pipeline
    for spec in family.specs(fields):
        if spec.load_only and layout.pipeline == 1:
            continue  # a tied head is the embedding
        stage, numel = spec.pipeline_stage(layout, fields.num_layers), spec.numel
        if "vocab" in type(spec.codec).__name__.lower():  # padded to equal shards
            numel = -(-fields.vocab_size // layout.tensor) * layout.tensor * fields.hidden_size
        if spec.expert is None:
            dense[stage] += numel // spec.num_shards(layout)
        else:
            expert[stage] += numel // spec.num_shards(layout)
    stages = range(layout.pipeline)
    assert [dense_parameters(fields, layout, s) for s in stages] == dense
    assert [expert_parameters(fields, layout, s) for s in stages] == [n // layout.expert for n in expert]


def test_nothing_is_sent_where_nothing_is_split() -> None:
    [alone] = step_traffic(MOE, ParallelLayout(), WORK)
    assert alone.total == 0
    for degree, kinds in {
        "tensor": {"sequence", "vocabulary", "replicated", "expert_gradients", "expert_parameters"},
        "data": {"gradients", "parameters", "expert_gradients", "expert_parameters"},
        "context": {"context", "gradients", "parameters", "expert_gradients", "expert_parameters"},
        "pipeline": {"pipeline"},
    }.items():
        model = replace(MOE, num_layers=2, moe_layers=(0, 1))
        assert set(only(mean(step_traffic(model, ParallelLayout(**{degree: 2}), WORK)))) == kinds


def test_bfloat16_halves_hidden_states_and_parameters_but_not_gradients() -> None:
    layout = ParallelLayout(tensor=2, data=2, expert=2)
    [full], [half] = (step_traffic(MOE, layout, replace(WORK, element_bytes=n)) for n in (4, 2))
    assert half.sequence == full.sequence / 2
    assert half.parameters == full.parameters / 2
    assert (half.gradients, half.expert_gradients) == (full.gradients, full.expert_gradients)


def test_a_layout_of_1024_gpus_takes_no_time() -> None:
    model = ModelFields(
        num_layers=96,
        hidden_size=4096,
        num_attention_heads=64,
        num_query_groups=4,
        head_dim=128,
        ffn_hidden_size=12288,
        vocab_size=151936,
        max_position_embeddings=40960,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied_embeddings=False,
        initializer_range=0.02,
        qk_layernorm=True,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=1536,
        moe_layers=tuple(range(96)),
    )
    layout = ParallelLayout(tensor=4, pipeline=8, virtual_pipeline=2, context=2, data=16, expert=32)
    assert layout.world_size == 1024
    start = time.perf_counter()
    stages = step_traffic(model, layout, StepWork(tokens=8 * 32768, micro_batches=8, element_bytes=2))
    assert time.perf_counter() - start < 0.5
    # A middle stage's 12 layers: 31/32 of each rank's 8·32768/8 tokens leave it 8 times, 4 times in 2·4096 bytes.
    assert stages[3].experts == 12 * 8 * 32768 / 8 * 8 * (4 * 2 * 4096 + 2 * 4) * 31 / 32
    assert math.isfinite(mean(stages).total)


# ---------------------------------------------------------------------------------------------------------------------
# The counter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import count_collectives

    return count_collectives


@pytest.fixture
def fourth_of_a_job() -> Iterator[None]:
    """Rank 1 of 4 in a job whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


class _ReducedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


ELEMENTS = 40  # float32: 160 bytes


def _backward() -> None:
    _ReducedBackward.apply(torch.zeros(ELEMENTS, requires_grad=True)).sum().backward()


def _coalesced() -> None:
    group = dist.group.WORLD
    with dist.distributed_c10d._coalescing_manager(group):
        dist.all_reduce(torch.zeros(ELEMENTS), group=group)
        dist.all_reduce(torch.zeros(ELEMENTS), group=group)


def _send() -> None:
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, torch.zeros(ELEMENTS), 2), dist.P2POp(dist.irecv, torch.zeros(ELEMENTS), 0)]
    ):
        request.wait()


CALLS = {
    "all_reduce": (lambda: dist.all_reduce(torch.zeros(ELEMENTS)), 2 * 160 * 3 / 4),
    "all_reduce later": (lambda: dist.all_reduce(torch.zeros(ELEMENTS), async_op=True).wait(), 2 * 160 * 3 / 4),
    "all_reduce in backward": (_backward, 2 * 160 * 3 / 4),
    "all_reduce coalesced": (_coalesced, 2 * 2 * 160 * 3 / 4),
    "all_gather": (
        lambda: dist.all_gather([torch.zeros(ELEMENTS) for _ in range(4)], torch.zeros(ELEMENTS)),
        4 * 160 * 3 / 4,
    ),
    "all_gather_into_tensor": (
        lambda: dist.all_gather_into_tensor(torch.zeros(4 * ELEMENTS), torch.zeros(ELEMENTS)),
        4 * 160 * 3 / 4,
    ),
    "_all_gather_base": (
        lambda: dist._all_gather_base(torch.zeros(4 * ELEMENTS), torch.zeros(ELEMENTS)),
        4 * 160 * 3 / 4,
    ),
    "reduce_scatter_tensor": (
        lambda: dist.reduce_scatter_tensor(torch.zeros(ELEMENTS // 4), torch.zeros(ELEMENTS)),
        160 * 3 / 4,
    ),
    "even all_to_all_single": (
        lambda: dist.all_to_all_single(torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)),
        160 * 3 / 4,
    ),
    "uneven all_to_all_single": (
        lambda: dist.all_to_all_single(torch.zeros(8), torch.zeros(ELEMENTS), [2, 2, 2, 2], [5, 30, 0, 5]),
        (5 + 0 + 5) * 4,
    ),
    "broadcast": (lambda: dist.broadcast(torch.zeros(ELEMENTS), 0), 160 * 3 / 4),
    "point to point": (_send, 160),
    "barrier": (dist.barrier, 0),
}


@pytest.mark.usefixtures("fourth_of_a_job")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_counter_sees_what_a_call_sends(counting: ModuleType, name: str) -> None:
    call, sent = CALLS[name]
    counter = counting.CollectiveCounter({dist.group.WORLD.group_name: "tp"})  # type: ignore[union-attr]
    with counter:
        call()
    assert sum(counter.sent.values()) == pytest.approx(sent)
    assert sent == 0 or set(counter.sent) == {"sequence"}


@pytest.mark.usefixtures("fourth_of_a_job")
def test_a_collective_that_the_counter_does_not_know_raises(counting: ModuleType) -> None:
    with pytest.raises(KeyError, match="gather_"), counting.CollectiveCounter({}):
        dist.gather(torch.zeros(1), dst=0)


@pytest.mark.parametrize(
    ("operator", "role", "callers", "kind"),
    [
        ("_allgather_base_", "tp", {"megatron/core/tensor_parallel/mappings"}, "sequence"),
        ("_allgather_base_", "edp", {"megatron/core/distributed/param_and_grad_buffer"}, "expert_parameters"),
        ("_reduce_scatter_base_", "", {"megatron/core/distributed/param_and_grad_buffer"}, "gradients"),
        ("allreduce_", "tp", {"megatron/core/distributed/finalize_model_grads"}, "replicated"),
        ("allreduce_", "tp", {"gspo_megatron/ops/reference", "gspo_megatron/policy/model"}, "vocabulary"),
        ("allreduce_", "cp", {"gspo_megatron/ops/reference"}, "other"),
        ("_allgather_base_", "cp", {"gspo_megatron/policy/attention"}, "context"),
        ("send", "", {"megatron/core/pipeline_parallel/p2p_communication"}, "pipeline"),
        ("allreduce_", "tp", {"megatron/core/optimizer/clip_grads"}, "other"),
        ("alltoall_base_", "ep", set(), "experts"),  # backward: nobody of Megatron or ours is on the stack
        ("allreduce_", "", set(), "other"),
    ],
)
def test_kinds(counting: ModuleType, operator: str, role: str, callers: set[str], kind: str) -> None:
    assert counting.kind_of(operator, role, callers) == kind


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(counting: ModuleType) -> ModuleType:
    import benchmark_layouts

    return benchmark_layouts


def test_layouts_are_read_from_their_tags(benchmark: ModuleType) -> None:
    assert benchmark.parse_layout("1") == ParallelLayout()
    assert benchmark.parse_layout("EP2xTP2") == ParallelLayout(tensor=2, expert=2)
    for text in ("TP", "XP2", "TP2,", "tp2", "TP2x"):
        with pytest.raises(UserError, match="EP2xTP2"):
            benchmark.parse_layout(text)
    with pytest.raises(UserError, match="expert"):
        benchmark.parse_layout("EP2")


def _result(benchmark: ModuleType, sent: dict[str, float], predicted: Traffic, *, escaped: int = 0) -> Any:
    total = sum(sent.values())
    rank = benchmark.RankResult(
        stage=0,
        step_s=[1.0],
        peak_rss_bytes=1,
        tokens=1,
        micro_batches=1,
        sent=sent,
        gloo_bytes=total,
        written_bytes=int(total) + escaped,
    )
    return benchmark.LayoutResult("TP2", [rank], [predicted])


@pytest.mark.parametrize(
    ("sent", "predicted", "complaint"),
    [
        ({"sequence": 1e6}, Traffic(sequence=1.04e6), None),
        ({"sequence": 1e6}, Traffic(sequence=1.06e6), "sequence"),
        ({"sequence": 1e6, "experts": 1e6}, Traffic(sequence=2e6), "experts"),  # the totals agree
        ({"sequence": 1e6}, Traffic(sequence=1e6, routing=2e4), "routing"),  # predicted, never seen
        ({"sequence": 1e6, "other": 2e4}, Traffic(sequence=1e6), "other"),
        ({"sequence": 1e6, "other": 5e3}, Traffic(sequence=1e6), None),  # too small to matter
    ],
)
def test_bytes_that_are_not_the_formulas_are_a_problem(
    benchmark: ModuleType, sent: dict[str, float], predicted: Traffic, complaint: str | None
) -> None:
    problems = _result(benchmark, sent, predicted).problems()
    assert bool(problems) == (complaint is not None)
    assert complaint is None or any(f"stage 0, {complaint}:" in problem for problem in problems)


def test_bytes_that_nobody_counted_are_a_problem(benchmark: ModuleType) -> None:
    result = _result(benchmark, {"sequence": 1e7}, Traffic(sequence=1e7), escaped=400_000)
    assert "the kernel saw 10,400,000 bytes" in "".join(result.problems())
