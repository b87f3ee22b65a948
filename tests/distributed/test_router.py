"""The routers' losses: equal to their definition, and the same in every parallel layout.

The definition is on one rank, from the logits of the model's routers. The layouts run through the trainer's own
`learn`, on top of GSPO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_invariance import ALGORITHMS, BUDGETS, TOKENIZER, check, differences, name_of

ON = {"router_aux_loss": 0.01, "router_z_loss": 0.001}
Step = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("model")
    return {kind: str(tiny_models.write(folder / kind, kind)) for kind in ("moe", "mixed")}


@pytest.fixture(scope="module")
def step(folders: dict[str, str], ranks: Callable[[int], RankPool]) -> Step:
    """step(layout, budget, …): the step's results, merged over ranks."""

    def run(
        layout: dict[str, int],
        budget: int = BUDGETS[0],
        *,
        model: dict[str, float] = ON,
        recompute: str = "none",
        **more: Any,
    ) -> dict[str, Any]:
        results = ranks(ParallelLayout(**layout).world_size).run(
            "tests.distributed.router_cases:step",
            layout=layout,
            folder=folders["moe"],
            tokenizer=TOKENIZER,
            algorithm=ALGORITHMS["gspo"],
            token_budget=budget,
            vocab=tiny_models.VOCAB,
            settings={"model": model, "memory": {"recompute": recompute}},
            **more,
        )
        merged = dict(results[0])
        merged["loss"] = sum(r["loss"] for r in results)
        merged["stats"] = {k: v for r in results for k, v in r["stats"].items()}
        merged["ranks"] = results
        return merged

    return run


@pytest.fixture(scope="module")
def reference(step: Step) -> Callable[..., dict[str, Any]]:
    """The single-rank, single-micro-batch step on a batch."""
    kept: dict[str, dict[str, Any]] = {}

    def get(batch: str = "main") -> dict[str, Any]:
        if batch not in kept:
            kept[batch] = step({}, batch=batch)
        return kept[batch]

    return get


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("coefficients", [ON, ON | {"router_z_loss": 0.0}, ON | {"router_aux_loss": 0.0}])
@pytest.mark.parametrize("kind", ["moe", "mixed"])
def test_gradients_and_values_are_those_of_the_definition(
    kind: str,
    coefficients: dict[str, float],
    budget: int,
    folders: dict[str, str],
    ranks: Callable[[int], RankPool],
) -> None:
    [found] = ranks(1).run(
        "tests.distributed.router_cases:alone",
        layout={},
        folder=folders[kind],
        vocab=tiny_models.VOCAB,
        token_budget=budget,
        coefficients=coefficients,
    )
    assert (found["num_micro_batches"] > 1) == (budget == BUDGETS[1])
    for name, expected in found["expected"].items():
        error = float((found["gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-8))
        assert error <= 1e-5, (name, error, expected.norm())
    of_routers = [g.norm() for name, g in found["expected"].items() if name.endswith("mlp.gate.weight")]
    assert len(of_routers) == {"moe": 4, "mixed": 2}[kind] and min(of_routers) > 1e-5
    for value, expected, on in zip(found["values"], found["expected_values"], coefficients.values(), strict=True):
        assert value == (pytest.approx(expected, rel=1e-6) if on else None)
        assert expected > 1, "no layer is balanced"


def check_losses(ours: dict[str, Any], truth: dict[str, Any], *, num_routers: int = 4) -> None:
    """The two steps are the same, and their routers' losses; each was computed once per router and micro-batch."""
    check(ours, truth)
    for rank in ours["ranks"]:
        assert rank["router_losses"] == pytest.approx(truth["router_losses"], rel=1e-5)
        assert rank["routers"] == num_routers
        assert rank["calls"] == num_routers * rank["num_micro_batches"]


LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
    {"data": 2, "expert": 2},
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_layout_takes_the_same_step(
    layout: dict[str, int], budget: int, step: Step, reference: Callable[..., dict[str, Any]]
) -> None:
    check_losses(step(layout, budget), reference(), num_routers=4 // layout.get("pipeline", 1))


def test_micro_batches_on_one_rank(step: Step, reference: Callable[..., dict[str, Any]]) -> None:
    ours = step({}, 26)
    assert ours["num_micro_batches"] >= 6
    check_losses(ours, reference())


@pytest.mark.parametrize("recompute", ["full", "moe", "selective"])
@pytest.mark.parametrize(
    "layout",
    [{"pipeline": 2, "virtual_pipeline": 2}, {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}],
    ids=name_of,
)
def test_recomputation_changes_nothing(
    recompute: str, layout: dict[str, int], step: Step, reference: Callable[..., dict[str, Any]]
) -> None:
    """The layers of several micro-batches are in flight, and each needs its own sequences again."""
    ours = step(layout, 26, recompute=recompute)
    assert ours["num_micro_batches"] >= 4
    check_losses(ours, reference(), num_routers=4 // layout.get("pipeline", 1))


@pytest.mark.parametrize(
    "layout",
    [
        {"context": 4, "expert": 4},
        {"data": 2, "expert": 2},
        {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
        {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
    ],
    ids=name_of,
)
def test_ranks_and_micro_batches_of_padding_alone(
    layout: dict[str, int], step: Step, reference: Callable[..., dict[str, Any]]
) -> None:
    ours = step(layout, 24, batch="edge")
    if "data" in layout or "pipeline" in layout:
        assert any(any(r["is_padding"]) for r in ours["ranks"])
    check_losses(ours, reference("edge"), num_routers=4 // layout.get("pipeline", 1))


def test_they_matter(step: Step, reference: Callable[..., dict[str, Any]]) -> None:
    off = {"router_aux_loss": 0.0, "router_z_loss": 0.0}
    for name in ON:
        error = differences(step({}, model=ON | {name: 0.0}), reference())
        assert error["gradient"] > 0.01, name
    without = step({}, model=off)
    assert without["loss"] == reference()["loss"], "the metric stays the policy's objective"


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "expert": 2}, {"pipeline": 2}], ids=name_of)
@pytest.mark.parametrize("recompute", ["none", "moe"])
def test_switched_off_they_leave_no_trace(layout: dict[str, int], recompute: str, step: Step) -> None:
    off = {"router_aux_loss": 0.0, "router_z_loss": 0.0}
    ours, megatrons = (
        step(layout, BUDGETS[1], model=off, recompute=recompute, sabotage=sabotage) for sabotage in ("", "megatron")
    )
    assert all(rank["calls"] == 0 and rank["router_losses"] == (None, None) for rank in ours["ranks"])
    assert ours["gradients"].keys() == megatrons["gradients"].keys() and ours["gradients"]
    for name, gradient in ours["gradients"].items():
        assert torch.equal(gradient, megatrons["gradients"][name]), name
    assert ours["loss"] == megatrons["loss"] and ours["grad_norm"] == megatrons["grad_norm"]


@pytest.mark.parametrize(
    ("sabotage", "layout", "budget"),
    [
        ("n", {}, BUDGETS[1]),
        ("n", {"data": 2}, BUDGETS[0]),
        ("reduction", {"tensor": 2}, BUDGETS[1]),  # where the cut between the ranks goes through sequences
        ("reduction", {"context": 2}, BUDGETS[0]),
        ("padding", {"context": 2}, BUDGETS[0]),
    ],
)
def test_taking_out_a_part_is_noticed(
    sabotage: str, layout: dict[str, int], budget: int, step: Step, reference: Callable[..., dict[str, Any]]
) -> None:
    ours, truth = step(layout, budget, sabotage=sabotage), reference()
    assert differences(ours, truth)["gradient"] > 1e-3
    assert abs(ours["router_losses"][0] / truth["router_losses"][0] - 1) > 1e-3
