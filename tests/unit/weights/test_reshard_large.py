"""Reshard plans for the published models and layouts in tools/reshard_models, up to 1,024 training GPUs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import Coordinates
from gspo_megatron.weights.reshard import BALANCE, ReshardPlan
from gspo_megatron.weights.rules import TensorSpec

TOOLS = Path(__file__).parents[3] / "tools"
MODELS = ("qwen3_30b_a3b", "qwen3_235b_a22b", "deepseek_v3", "kimi_k2")
GPUS = (64, 256, 1024)
EVERY_CELL = [(model, gpus) for model in MODELS for gpus in GPUS]
PLANNING_LIMIT_S = 10.0


@pytest.fixture(scope="module")
def cells() -> Iterator[Any]:
    """tools/reshard/cells.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        from reshard import cells

        yield cells


@dataclass(frozen=True)
class Planned:
    model: Any
    servers: Any
    asked_bytes: int  # of a bucket
    plan: ReshardPlan
    cpu_s: float


def make(module: Any, model: str, gpus: int) -> Planned:
    cases = module.load_cases()
    (cell,) = module.choose(cases.cells, model, gpus)
    loaded = module.load_model(model)
    start = time.process_time()
    plan = module.make_plan(loaded, cell, cases.bucket_bytes)
    return Planned(loaded, cell.servers, cases.bucket_bytes, plan, time.process_time() - start)


@pytest.fixture(scope="module", params=EVERY_CELL, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def planned(request: pytest.FixtureRequest, cells: Any) -> Planned:
    """One cell's plan; tests are grouped by cell, so that one plan at a time is kept."""
    return make(cells, *request.param)


def test_every_model_is_listed_at_every_size(cells: Any) -> None:
    assert sorted((c.model, c.gpus) for c in cells.load_cases().cells) == sorted(EVERY_CELL)


def test_servers_are_half_as_many_gpus_or_as_many(planned: Planned) -> None:
    assert 0.5 <= planned.servers.tensor * planned.servers.count / planned.plan.layout.world_size <= 1


def test_every_tensor_is_sent_once_by_a_rank_that_gets_every_shard(planned: Planned) -> None:
    plan = planned.plan
    exported = [s for s in planned.model.specs if not s.load_only]
    assert [s.megatron for s in plan.specs] == [s.megatron for s in exported]
    sent = Counter(i for step in plan.steps for b in step.buckets for i in b.specs)
    assert sent == Counter(range(len(exported)))

    shards = {(m.spec, m.shard, m.destination) for step in plan.steps for m in step.moves}
    assert len(shards) == sum(len(step.moves) for step in plan.steps)
    wanted = {
        (i, shard, bucket.sender)
        for step in plan.steps
        for bucket in step.buckets
        for i in bucket.specs
        for shard in range(plan.specs[i].num_shards(plan.layout))
    }
    assert shards == wanted


def holds(place: Coordinates, spec: TensorSpec, shard: int, planned: Planned) -> bool:
    """Whether a rank holds a shard, from its place in both grids."""
    layout, fields = planned.plan.layout, planned.model.fields
    if spec.layer is not None:
        stage = spec.layer * layout.pipeline // fields.num_layers
    else:
        stage = 0 if spec.hf == ("model.embed_tokens.weight",) else layout.pipeline - 1
    if place.pipeline != stage:
        return False
    if spec.expert is None:
        return spec.dim is None or place.tensor == shard
    return place.expert == spec.expert // (fields.num_experts // layout.expert)


def test_shards_come_from_ranks_that_hold_them(planned: Planned) -> None:
    plan = planned.plan
    assert plan.layout.expert_tensor == plan.layout.virtual_pipeline == 1, "holds() knows no others"
    places = {rank: plan.layout.coordinates(rank) for rank in range(plan.layout.world_size)}
    for step in plan.steps:
        for move in step.moves:
            assert holds(places[move.source], plan.specs[move.spec], move.shard, planned), move


def test_senders_are_few_and_share_the_work_of_their_stage(planned: Planned) -> None:
    plan = planned.plan
    assert len(plan.senders(0)) <= 64
    by_stage: dict[int, list[int]] = {}
    for rank, nbytes in plan.sent_bytes(0).items():
        by_stage.setdefault(plan.layout.coordinates(rank).pipeline, []).append(nbytes)
    assert sorted(by_stage) == list(range(plan.layout.pipeline))
    uneven = {stage: max(s) * len(s) / sum(s) for stage, s in by_stage.items()}
    assert max(uneven.values()) <= BALANCE == 1.1, uneven


def test_no_rank_needs_more_than_two_buckets_of_memory(planned: Planned) -> None:
    plan = planned.plan
    assert plan.bucket_bytes == max(planned.asked_bytes, *(plan.spec_bytes(i) for i in range(len(plan.specs))))
    assert all(b.nbytes <= plan.bucket_bytes for step in plan.steps for b in step.buckets)
    # All senders, and the ranks that give most in one step: a rank that only gives holds nothing else.
    given: Counter[int] = Counter()
    for step in plan.steps:
        in_step: Counter[int] = Counter()
        for move in step.moves:
            in_step[move.source] += plan.shard_bytes(move.spec) * (move.source != move.destination)
        given |= in_step
    ranks = {*plan.senders(0), *(rank for rank, _ in given.most_common(64))}
    peaks = {rank: plan.peak_bytes(rank) / plan.bucket_bytes for rank in ranks}
    assert max(peaks.values()) <= 2, max(peaks.items(), key=lambda item: item[1])


def test_a_server_rank_receives_the_model_once(planned: Planned) -> None:
    received = sum(b.nbytes for step in planned.plan.steps for b in step.buckets)
    model_bytes = 2 * sum(s.numel for s in planned.model.specs if not s.load_only)
    assert model_bytes <= received <= 1.02 * model_bytes


def test_planning_takes_seconds(planned: Planned) -> None:
    assert planned.cpu_s < PLANNING_LIMIT_S


# --- the figures of tools/benchmark_reshard.py -----------------------------------------------------------------


def test_predicted_seconds_by_hand(cells: Any) -> None:
    """One stage, one tensor rank, all experts on senders: nothing is gathered, so only sending and calls count."""
    from reshard.figures import measure

    cases = cells.load_cases()
    (cell,) = cells.choose(cases.cells, "qwen3_30b_a3b", 256)
    found = measure(cells.load_model("qwen3_30b_a3b"), cell, cases.bucket_bytes, cases.links, cases.call)
    tensors = 2 + 1 + 48 * (4 + 2 + 2 + 1 + 3 * 128)  # embedding, head, norm; projections, norms, router, experts
    assert found.gathered_bytes == found.relayed_bytes == 0
    assert found.sending_s == pytest.approx(2 * 30_532_122_624 / 50e9)
    assert found.calls_s == pytest.approx(
        found.num_buckets * cases.call.seconds_per_call + tensors * cases.call.seconds_per_tensor
    )
    assert found.waiting_s == 0 and found.seconds == found.sending_s + found.calls_s
    assert found.received_over_model == 1 and found.received_over_shard == pytest.approx(2)


def test_gathering_that_is_slower_than_sending_is_waited_for(cells: Any) -> None:
    from reshard.figures import predict

    cases = cells.load_cases()
    plan = make(cells, "kimi_k2", 1024).plan
    slow = replace(cases.links, nvlink_gb_per_s=1.0, server_nic_gb_per_s=1000.0)
    sending_s, _, waiting_s = predict(plan, slow, cases.call)
    assert sending_s == pytest.approx(plan.num_bytes / 50e9), "the slower NIC counts"
    assert waiting_s > 10 * predict(plan, cases.links, cases.call)[2]


def test_an_unknown_cell_is_named_with_those_there_are(cells: Any) -> None:
    with pytest.raises(UserError, match="--model kimi: there is no such cell; there are qwen3_30b_a3b on 64, "):
        cells.choose(cells.load_cases().cells, "kimi", None)


def test_the_tool_prints_one_cell_without_writing(
    cells: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark_reshard

    monkeypatch.chdir(tmp_path)
    assert benchmark_reshard.main(["planned", "--model", "qwen3_30b_a3b", "--gpus", "64"]) == 0
    printed = capsys.readouterr().out
    assert "predictions" in printed and "| qwen3_30b_a3b | 64 |" in printed and "kimi_k2" not in printed
    assert not list(tmp_path.iterdir())
    assert benchmark_reshard.main(["planned", "--gpus", "7"]) == 2
    assert "no such cell" in capsys.readouterr().err
