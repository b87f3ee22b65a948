"""Whole steps of real runs: the engine samples, the trainer recomputes, the weights go back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.data.packing import plan_packing
from gspo_megatron.metrics import METRICS
from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.cases import STEP_LENGTHS
from tests.distributed.rank_pool import RankPool

MODEL = str(Path(__file__).parents[2] / "examples" / "quickstart" / "model")
CONFIG: dict[str, Any] = {
    "run": {"folder": "unused", "seed": 3},  # the first mini-batch has rewards that differ
    "model": {"path": MODEL, "init": "random"},
    "task": {
        "name": "reasoning_gym",
        "dataset": "spell_backward",
        "params": {"min_word_len": 3, "max_word_len": 8},
        "prompt_pattern": r": (?P<word>\w+)$",
        "prompt_template": "{word}>",
        "lowercase": True,  # partial credit stays on: random weights must have rewards that differ
    },
    "algorithm": {"name": "gspo", "mini_batches": 2},
    "rollout": {"prompts_per_batch": 8, "samples_per_prompt": 4, "max_response_tokens": 12, "temperature": 0.8},
    "data": {"token_budget": 256},
    "optimizer": {"lr": 1e-3},
}
LAYOUTS = [
    {},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2},
    {"data": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "data": 2, "expert": 4},
    {"context": 2},
    {"context": 2, "pipeline": 2, "expert": 2},
    {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
]


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


def run(
    ranks: Callable[[int], RankPool], layout: dict[str, int], config: dict[str, Any] = CONFIG, sabotage: str = ""
) -> list[dict[str, Any]]:
    pool = ranks(ParallelLayout(**layout).world_size)
    return pool.run("tests.distributed.cases:first_batch", layout=layout, config=config, sabotage=sabotage)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_first_mini_batch_is_on_policy(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, layout)
    first, second = ([x for r in results if r["log_ratio"] for x in r["log_ratio"][j]] for j in (0, 1))
    assert len(first) >= 16 and len(second) >= 16
    assert max(map(abs, first)) <= 1e-6
    assert max(map(abs, second)) > 1e-4, "the first optimizer step moved the policy"
    assert max(x for r in results for x in r["gap_to_engine"]) <= 1e-4, "engine and trainer hold the same weights"
    assert {r["engine_version"] for r in results if r["has_engine"]} == {1}
    assert all(0 < norm < float("inf") for r in results for norm in r["grad_norms"])


def test_a_step_has_no_collective_over_a_group_that_is_not_connected_before() -> None:
    """Over NCCL a group's communicator takes memory when it is first used."""
    pool = RankPool(2, shares_groups=False)  # a group of the same ranks is another one
    try:
        for layout in ({"tensor": 2, "expert": 2}, {"pipeline": 2}):
            arguments = {"layout": layout, "config": CONFIG | {"telemetry": {"every": 1}}}
            assert pool.run("tests.distributed.cases:unconnected_groups", **arguments) == [[]] * 2
    finally:
        pool.close()


@pytest.mark.parametrize(("mode", "layout"), [("r2", {"tensor": 2, "expert": 2}), ("r3", {"pipeline": 2})])
def test_routes_are_replayed_and_the_first_mini_batch_is_on_policy(
    mode: str, layout: dict[str, int], ranks: Callable[[int], RankPool]
) -> None:
    results = run(ranks, layout, {**CONFIG, "model": {**CONFIG["model"], "routing_replay": mode}})
    assert max(abs(x) for r in results if r["log_ratio"] for x in r["log_ratio"][0]) <= 1e-6
    assert max(x for r in results for x in r["gap_to_engine"]) <= 1e-4
    # The engine has no route of a response's last token.
    for fraction in (f for r in results for f in r["routing_replayed"]):
        assert fraction == 1 if mode == "r2" else 0.8 < fraction < 1


@pytest.mark.parametrize("sabotage", ["temperature", "weights", "packing"])
def test_a_stale_old_policy_shows_in_the_first_mini_batch(sabotage: str, ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, {"tensor": 2, "expert": 2}, sabotage=sabotage)
    assert max(abs(x) for r in results for x in r["log_ratio"][0]) > 1e-5


def test_replicas_generate_different_prompts(ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, {"tensor": 2, "data": 2, "expert": 4})
    heads = [set(r["prompts"]) for r in results if r["has_engine"]]
    assert len(heads) == 2
    assert heads[0] and heads[1] and not heads[0] & heads[1]
    assert heads[0] | heads[1] == set(range(8))
    assert all(not r["prompts"] for r in results if not r["has_engine"])


def test_replicas_hold_the_same_weights_after_the_step(ranks: Callable[[int], RankPool]) -> None:
    results = run(ranks, {"data": 2})
    first, second = (r["weights"] for r in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", [{"tensor": 2, "expert": 2}, {"pipeline": 2}], ids=name_of)
def test_reference_model_is_the_initial_policy(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    config = {**CONFIG, "algorithm": {**CONFIG["algorithm"], "kl_coefficient": 0.05}}
    gaps = [gap for r in run(ranks, layout, config) for gap in r["reference_gap"]]
    assert gaps and max(gaps) <= 1e-6


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "expert": 2}, {"pipeline": 2}, {"data": 2, "expert": 2}, {"context": 2}],
    ids=name_of,
)
def test_reference_model_stays_when_the_policy_moves(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    config = {**CONFIG, "algorithm": {**CONFIG["algorithm"], "kl_coefficient": 0.05}}
    pool = ranks(ParallelLayout(**layout).world_size)
    results = pool.run("tests.distributed.cases:reference_after_step", layout=layout, config=config)
    assert max(gap for r in results for gap in r["reference"]) <= 1e-6
    assert min(gap for r in results for gap in r["policy"]) > 1e-4
    assert all(r["unchanged"] for r in results), "the policy's weights come back bit by bit"


# Differ between layouts by nature: seconds, and how the sequences were packed.
NOT_COMPARED = {"padding_fraction", "rollout_tokens_per_s", *(name for name in METRICS if name.startswith("time_"))}


def padding_fraction(*, context: int) -> float:
    """Of the batch of `recorded_row`, two mini-batches of at most 40 tokens a micro-batch on one replica: each sequence
    is padded to a multiple of 2 × context."""
    real = packed = 0
    for lengths in (STEP_LENGTHS[:6], STEP_LENGTHS[6:]):
        [micro_batches] = plan_packing(lengths, data_parallel=1, token_budget=40).assignment
        for micro in micro_batches:
            real += sum(lengths[i] for i in micro)
            packed += sum(-(-lengths[i] // (2 * context)) * 2 * context for i in micro)
    return 1 - real / packed


def test_metrics_are_the_same_in_every_layout(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    folder = tiny_models.write(tmp_path / "model", "moe")
    rows = {}
    for layout in (
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"tensor": 2, "pipeline": 2},
        {"data": 2, "expert": 2},
        {"context": 2},
        {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
    ):
        run_folder = tmp_path / name_of(layout)
        ranks(ParallelLayout(**layout).world_size).run(
            "tests.distributed.cases:recorded_row",
            layout=layout,
            folder=str(folder),
            tokenizer=MODEL,
            run_folder=str(run_folder),
            vocab=tiny_models.VOCAB,
        )
        [line] = (run_folder / "metrics.jsonl").read_text().splitlines()
        row = json.loads(line)
        if layout == {"context": 2}:
            assert row["padding_fraction"] == pytest.approx(padding_fraction(context=2))
        rows[name_of(layout)] = {k: v for k, v in row.items() if k not in NOT_COMPARED}
    truth = rows.pop(name_of({}))
    measured = ("loss", "entropy", "kl_reference", "clip_fraction_sequence", "log_ratio_sequence_p99", "grad_norm")
    for name in (*measured, "router_aux_loss", "router_z_loss"):
        assert truth[name], f"{name} must be a number other than 0 to be worth comparing"
    for layout_name, row in rows.items():
        for name, value in truth.items():
            expected = pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value
            assert row[name] == expected, f"{layout_name}: {name}"


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2, "expert": 2},
        {"context": 2},
        {"data": 2},
        {"pipeline": 2},
        {"data": 2, "expert": 2},
        {"data": 2, "expert_tensor": 2},
        {"tensor": 2, "data": 2, "expert_tensor": 2},
    ],
    ids=name_of,
)
def test_micro_batches_without_gradient_skip_backward(
    layout: dict[str, int], tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    folder = str(tiny_models.write(tmp_path / "moe", "moe"))
    arguments = {"layout": layout, "folder": folder, "vocab": tiny_models.VOCAB}
    pool = ranks(ParallelLayout(**layout).world_size)
    whole = pool.run("tests.distributed.policy_cases:idle_micro_batches", skip=False, **arguments)
    ours = pool.run("tests.distributed.policy_cases:idle_micro_batches", skip=True, **arguments)
    assert max(float(g.norm()) for g in whole[0]["gradients"].values()) > 1e-3
    for name, gradient in whole[0]["gradients"].items():
        torch.testing.assert_close(ours[0]["gradients"][name], gradient, rtol=0, atol=1e-7)
    for with_all, without in zip(whole, ours, strict=True):
        assert with_all["count"] >= 2 and with_all["idle"] >= 1
        degree = ParallelLayout(**layout)
        spread = degree.tensor * degree.context % (degree.expert * degree.expert_tensor) > 0
        alone = degree.pipeline == 1 and not spread
        skipped = with_all["idle"] if alone else 0
        if with_all["passes"]:  # 0 where it is not the last stage
            assert (with_all["passes"], without["passes"]) == (with_all["count"], with_all["count"] - skipped)
