"""One optimizer step is the same in every parallel layout: loss, log s, gradients, weights, in float32.

Everything runs through the trainer's own `learn`: data plan, exchange, packing, the pass for the old
log-probabilities, Megatron's schedule, DDP, finalize and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron import algorithms
from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.cases import BRANCHES, EDGE_BRANCHES
from tests.distributed.rank_pool import RankPool

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "quickstart" / "model")
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gspo": {"name": "gspo", "dual_clip": 1.001},
    "gspo_token": {"name": "gspo_token", "dual_clip": 1.001},
    "grpo": {"name": "grpo"},
    "gspo_kl": {"name": "gspo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01, "mismatch": "truncate"},
    "gspo_no_kl": {"name": "gspo", "entropy_coefficient": 0.01, "mismatch": "truncate"},
}
# The comparison arms, and the corrections that look at whole responses. Their own bounds on the loss: a sum over tokens
# of log-probabilities is larger than a mean of ratios.
ARMS: dict[str, dict[str, Any]] = {
    "cispo": {"name": "cispo", "clip_high": 0.3},
    "gmpo": {"name": "gmpo"},
    "sapo": {"name": "sapo"},
    "luspo": {"name": "luspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "vespo": {"name": "vespo"},
    "minirl": {"name": "minirl"},
    # Geo-RS drops sequences 3, 6, 7 and 11, OPSM sequence 2; of the edge batch Geo-RS drops the first.
    "dropping": {
        "name": "gspo",
        "mismatch": "geometric",
        "mismatch_low": 0.13,
        "mismatch_high": 0.3,
        "opsm_delta": 1.9,
    },
}
LAYOUTS = [
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {"data": 2},
    {"data": 2, "expert": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"tensor": 2, "data": 2, "expert": 2},
    {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
    {"tensor": 2, "pipeline": 2},
    {"data": 2, "pipeline": 2, "expert": 2},
    {"data": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
    {"context": 2, "pipeline": 2},
    {"context": 2, "tensor": 2},
    {"context": 2, "expert": 2},
    {"context": 2, "data": 2},
    {"context": 4, "expert": 4},
]
RICH_LAYOUTS = [
    {"tensor": 2, "data": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2},
    {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
    {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
]
BUDGETS = [160, 40]  # tokens per micro-batch: all in one, and several
CASES = [
    *((algorithm, layout, budget) for algorithm in ("gspo", "grpo") for layout in LAYOUTS for budget in BUDGETS),
    *(("gspo_token", layout, BUDGETS[1]) for layout in LAYOUTS),
    *(("gspo_kl", layout, budget) for layout in RICH_LAYOUTS for budget in BUDGETS),
    *((algorithm, layout, BUDGETS[1]) for algorithm in ("gspo", "grpo") for layout in RICH_LAYOUTS[2:]),
]
# Settings that must change nothing, each in a layout where it does something. Buckets are small there, so that
# overlapped communication has several.
OVERLAP = {"overlap_grad_reduce": True}
SETTINGS: dict[str, tuple[dict[str, int], dict[str, dict[str, Any]]]] = {
    "plain optimizer": ({"data": 2}, {"optimizer": {"distributed": False}}),
    "plain optimizer, experts": ({"data": 2, "expert": 2}, {"optimizer": {"distributed": False}}),
    "plain optimizer, overlap": ({"data": 2, "pipeline": 2}, {"optimizer": {"distributed": False, **OVERLAP}}),
    "overlapped gradients": ({"data": 2, "context": 2}, {"optimizer": OVERLAP}),
    "overlap": ({"data": 2}, {"optimizer": OVERLAP | {"overlap_param_gather": True}}),
    "overlap, VPP": (
        {"data": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
        {"optimizer": OVERLAP | {"overlap_param_gather": True}},
    ),
    "overlap, TP": (
        {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
        {"optimizer": OVERLAP | {"overlap_param_gather": True}},
    ),
    "sequential experts": ({}, {"model": {"experts": "sequential"}}),
    "sequential experts, ETP": (
        {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
        {"model": {"experts": "sequential"}},
    ),
    "sequential experts, EP": ({"tensor": 2, "expert": 2}, {"model": {"experts": "sequential"}}),
    "full recomputation": ({"context": 2, "tensor": 2}, {"memory": {"recompute": "full"}}),
    "full recomputation, VPP": ({"pipeline": 2, "virtual_pipeline": 2}, {"memory": {"recompute": "full"}}),
    "selective recomputation": ({"context": 2, "pipeline": 2}, {"memory": {"recompute": "selective"}}),
    "MoE recomputation": ({"tensor": 2, "expert": 2}, {"memory": {"recompute": "moe"}}),
    "reference kernels": ({"tensor": 2}, {"kernels": {"implementation": "reference"}}),
    "reference kernels, CP": ({"context": 2, "data": 2}, {"kernels": {"implementation": "reference"}}),
    "every token's backward": ({"context": 2}, {"kernels": {"skip_zero_gradients": False}}),
    "offloaded gradients": ({"data": 2}, {"memory": {"offload_gradients": True}}),
}
# Of the batch where it is smaller: the bound on the loss holds for both.
MEAN_ADVANTAGE = min(sum(abs(a) for _, a in batch) / len(batch) for batch in (BRANCHES, EDGE_BRANCHES))


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


def test_every_registered_algorithm_takes_a_step_here() -> None:
    assert {settings["name"] for settings in (ALGORITHMS | ARMS).values()} == set(algorithms.ALGORITHMS)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], RankPool]) -> Callable[..., dict[str, Any]]:
    """step(layout, algorithm, budget, …): the step's results, merged over ranks."""
    folder = tiny_models.write(tmp_path_factory.mktemp("model") / "moe", "moe")

    def run(layout: dict[str, int], algorithm: str, budget: int = BUDGETS[0], **more: Any) -> dict[str, Any]:
        results = ranks(ParallelLayout(**layout).world_size).run(
            "tests.distributed.cases:optimizer_step",
            layout=layout,
            folder=str(folder),
            tokenizer=TOKENIZER,
            algorithm=(ALGORITHMS | ARMS)[algorithm],
            token_budget=budget,
            vocab=tiny_models.VOCAB,
            **more,
        )
        merged = dict(results[0])
        for name in ("loss", "kl"):
            merged[name] = sum(r[name] for r in results)
        merged["stats"] = {k: v for r in results for k, v in r["stats"].items()}
        merged["ranks"] = results
        return merged

    return run


@pytest.fixture(scope="module")
def reference(step: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The single-rank, single-micro-batch step of an algorithm."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}

    def get(algorithm: str, batch: str = "main") -> dict[str, Any]:
        if (algorithm, batch) not in kept:
            kept[algorithm, batch] = step({}, algorithm, batch=batch)
        return kept[algorithm, batch]

    return get


def differences(ours: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """Largest relative gradient error of a tensor, and absolute errors of the rest."""
    gradients = {
        name: float((ours["gradients"][name] - g).norm() / g.norm().clamp(min=1e-8))
        for name, g in truth["gradients"].items()
        if g.norm() > 1e-8 or ours["gradients"][name].norm() > 1e-8
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return {
        "worst": worst,
        "gradient": gradients[worst],
        "loss": abs(ours["loss"] - truth["loss"]),
        "log_ratio": max(abs(ours["stats"][i][0] - truth["stats"][i][0]) for i in truth["stats"]),
        "weights": max(float((ours["weights"][n] - w).abs().max()) for n, w in truth["weights"].items()),
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_fixed_batch_is_worth_testing_with(algorithm: str, reference: Callable[..., dict[str, Any]]) -> None:
    truth = reference(algorithm)
    assert truth["num_micro_batches"] == 1
    assert sorted(truth["stats"]) == list(range(12))
    assert truth["router_margin"] >= 1e-4, "a top-k tie would make the comparison a lottery"
    if algorithm == "grpo":
        assert truth["clip_margin"] >= 1e-5
        assert 3 <= sum(clipped for _, clipped in truth["stats"].values()) <= 11
        return
    spread = torch.tensor([truth["stats"][i][0] for i in range(12) if i != 9])
    assert spread.max() > 4e-4 + 1e-5 and spread.min() < -3e-4 - 1e-5
    bounds = torch.tensor([-3e-4, 4e-4, 1e-3])
    assert (spread[:, None] - bounds).abs().min() >= 1e-5
    clipped = {i for i, (_, c) in truth["stats"].items() if c}
    assert clipped == ({0, 2, 6, 11} if "dual_clip" in ALGORITHMS[algorithm] else {0, 2, 11})


def test_the_reference_of_the_fixed_batch_is_elsewhere(reference: Callable[..., dict[str, Any]]) -> None:
    with_kl, without = reference("gspo_kl"), reference("gspo_no_kl")
    coefficient = ALGORITHMS["gspo_kl"]["kl_coefficient"]
    assert with_kl["kl"] > 0.01
    assert with_kl["loss"] - without["loss"] == pytest.approx(coefficient * with_kl["kl"], rel=1e-4)
    assert differences(with_kl, without)["gradient"] > 0.01


def check(ours: dict[str, Any], truth: dict[str, Any]) -> None:
    """The two steps are the same."""
    assert ours["gradients"].keys() == truth["gradients"].keys()
    error = differences(ours, truth)
    assert error["gradient"] <= 1e-5, error
    assert error["loss"] <= 1e-6 * MEAN_ADVANTAGE, error
    assert error["log_ratio"] <= 1e-6, error
    assert {i: c for i, (_, c) in ours["stats"].items()} == {i: c for i, (_, c) in truth["stats"].items()}
    assert error["weights"] <= 1e-6, error  # a thousandth of the learning rate
    assert abs(ours["grad_norm"] - truth["grad_norm"]) <= 1e-5 * truth["grad_norm"]


@pytest.mark.parametrize(
    ("algorithm", "layout", "budget"), CASES, ids=lambda x: name_of(x) if isinstance(x, dict) else str(x)
)
def test_every_layout_takes_the_same_step(
    algorithm: str,
    layout: dict[str, int],
    budget: int,
    step: Callable[..., dict[str, Any]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    ours = step(layout, algorithm, budget)
    assert ours["num_micro_batches"] > 1 or budget == BUDGETS[0]
    check(ours, reference(algorithm))


@pytest.mark.parametrize(
    ("layout", "batch", "budget"),
    [({"context": 2, "data": 2}, "main", BUDGETS[1]), ({"context": 2}, "edge", 24)],
    ids=["CP 2, DP 2", "CP 2, without response tokens"],
)
@pytest.mark.parametrize("algorithm", ARMS)
def test_every_arm_takes_the_same_step_on_shared_sequences_and_in_micro_batches(
    algorithm: str,
    layout: dict[str, int],
    batch: str,
    budget: int,
    step: Callable[..., dict[str, Any]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    ours, truth = step(layout, algorithm, budget, batch=batch), reference(algorithm, batch)
    assert ours["num_micro_batches"] > 1
    if algorithm == "dropping":
        assert differences(truth, reference("gspo", batch))["gradient"] > 0.1
    error = differences(ours, truth)
    assert error["gradient"] <= 1e-5, error
    assert error["loss"] <= 1e-6 * max(abs(truth["loss"]), MEAN_ADVANTAGE), error
    assert error["log_ratio"] <= 1e-6 and error["weights"] <= 1e-6, error
    assert {i: c for i, (_, c) in ours["stats"].items()} == {i: c for i, (_, c) in truth["stats"].items()}


def in_effect(layout: dict[str, int], settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `cases.optimizer_step` must report of the settings."""
    optimizer, memory = settings.get("optimizer", {}), settings.get("memory", {})
    recompute = {
        "none": (None, ["core_attn"]),
        "selective": ("selective", ["core_attn"]),
        "moe": ("selective", ["moe"]),
        "full": ("full", ["core_attn"]),
    }
    sequential = settings.get("model", {}).get("experts") == "sequential"
    kernels = settings.get("kernels", {})
    degree = ParallelLayout(**layout)
    alone = (
        degree.pipeline == 1
        and (degree.tensor * degree.context) % (degree.expert * degree.expert_tensor) == 0
        and not optimizer.get("overlap_grad_reduce")
    )
    return {
        "kernels": kernels.get("implementation", "native"),
        "skip_zero_gradients": kernels.get("skip_zero_gradients", True) and alone,
        "distributed": optimizer.get("distributed", True),
        "overlap_grad_reduce": optimizer.get("overlap_grad_reduce", False),
        "overlap_param_gather": optimizer.get("overlap_param_gather", False),
        "recompute": recompute[memory.get("recompute", "none")],
        "experts": {"SequentialMLP" if sequential else "GroupedExperts"},
        "offload_gradients": memory.get("offload_gradients", False),
    }


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_must_change_nothing(
    name: str, budget: int, step: Callable[..., dict[str, Any]], reference: Callable[..., dict[str, Any]]
) -> None:
    layout, settings = SETTINGS[name]
    ours = step(layout, "gspo", budget, settings=settings)
    assert ours["in_effect"] == in_effect(layout, settings)
    if "overlap" in name:
        assert ours["num_buckets"] >= 2 * layout.get("virtual_pipeline", 1)
    check(ours, reference("gspo"))


@pytest.mark.parametrize("layout", [{}, {"context": 2, "tensor": 2}, {"data": 2, "expert": 2}], ids=name_of)
def test_padding_changes_nothing(
    layout: dict[str, int], step: Callable[..., dict[str, Any]], reference: Callable[..., dict[str, Any]]
) -> None:
    check(step(layout, "gspo", 12 * 32, pad_to=32), reference("gspo"))


def test_micro_batches_on_one_rank(
    step: Callable[..., dict[str, Any]], reference: Callable[..., dict[str, Any]]
) -> None:
    check(step({}, "gspo", BUDGETS[1]), reference("gspo"))
    assert step({}, "gspo", 26)["num_micro_batches"] >= 6
    check(step({}, "gspo", 26), reference("gspo"))


EDGES = [
    {"context": 2},
    {"context": 4, "expert": 4},
    {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
    {"data": 2, "expert": 2},
    {"data": 2, "context": 2, "expert": 4},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
]


@pytest.mark.parametrize("settings", [{}, {"optimizer": OVERLAP | {"overlap_param_gather": True}}], ids=["", "overlap"])
@pytest.mark.parametrize("algorithm", ["gspo", "grpo", "gspo_kl"])
@pytest.mark.parametrize("layout", EDGES, ids=name_of)
def test_ranks_and_micro_batches_without_response_tokens(
    layout: dict[str, int],
    algorithm: str,
    settings: dict[str, Any],
    step: Callable[..., dict[str, Any]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    ours = step(layout, algorithm, 24, batch="edge", settings=settings)
    has_response = [r["has_response"] for r in ours["ranks"] if r["has_response"]]
    if "context" in layout:
        assert not all(any(rank) for rank in has_response), "a context-parallel rank holds no response token"
    assert any(not micro for rank in has_response for micro in rank), "a micro-batch is all masked"
    if layout.get("data", 1) > 1 or "virtual_pipeline" in layout:
        assert any(any(r["is_padding"]) for r in ours["ranks"]), "a micro-batch is empty"
    check(ours, reference(algorithm, "edge"))


@pytest.mark.parametrize(
    ("sabotage", "algorithm", "layout", "budget"),
    [
        ("data", "gspo", {"data": 2}, BUDGETS[0]),
        ("micro_batch", "gspo", {}, BUDGETS[1]),
        ("n", "gspo", {}, BUDGETS[0]),
        ("context", "gspo", {"context": 2}, BUDGETS[0]),
        ("tokens", "cispo", {"data": 2}, BUDGETS[0]),
        ("context", "gmpo", {"context": 2}, BUDGETS[0]),
        ("context", "luspo", {"context": 2}, BUDGETS[0]),
        ("context", "dropping", {"context": 2}, BUDGETS[0]),
        ("megatron", "gspo", {"data": 2}, BUDGETS[0]),
        ("megatron", "gspo", {"context": 2}, BUDGETS[0]),
        ("megatron", "gspo", {}, BUDGETS[1]),
    ],
)
def test_taking_out_a_normalisation_is_noticed(
    sabotage: str,
    algorithm: str,
    layout: dict[str, int],
    budget: int,
    step: Callable[..., dict[str, Any]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    error = differences(step(layout, algorithm, budget, sabotage=sabotage), reference(algorithm))
    assert error["gradient"] > 0.1
