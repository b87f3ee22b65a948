"""The policy's optimizer step against torch's AdamW: schedule, moments, weight decay, clipping, cleared gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.config import KernelsConfig
from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool

TOTAL_STEPS = 10  # what cases.make_policy gives the schedule
SETTINGS: dict[str, Any] = {
    "lr": 2e-3,
    "min_lr": 5e-4,
    "decay": "linear",
    "warmup_steps": 2,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-4,
    "weight_decay": 0.1,
    "clip_grad": 0.05,
}
OWN = {"distributed": False}  # each rank has an optimizer of its own
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.write(tmp_path_factory.mktemp("model") / "moe", "moe"))


def run(
    ranks: Callable[[int], RankPool], case: str, layout: dict[str, int], folder: str, **arguments: Any
) -> list[dict[str, Any]]:
    pool = ranks(ParallelLayout(**layout).world_size)
    return pool.run(
        f"tests.distributed.policy_cases:{case}", layout=layout, folder=folder, vocab=tiny_models.VOCAB, **arguments
    )


def scheduled(step: int) -> float:
    """The learning rate of the step, counted from 1."""
    peak, least, warmup = SETTINGS["lr"], SETTINGS["min_lr"], SETTINGS["warmup_steps"]
    if step <= warmup:
        return peak * step / warmup
    return least + (peak - least) * (1 - (step - warmup) / (TOTAL_STEPS - warmup))


def replay(
    weights: dict[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]]
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The weights after each step and the gradient norms before clipping, by torch in float64."""
    parameters = {name: torch.nn.Parameter(w.double()) for name, w in weights.items()}
    decayed = [p for p in parameters.values() if p.dim() > 1]
    rest = [p for p in parameters.values() if p.dim() == 1]
    assert decayed and rest
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
    )
    after, norms = [], []
    for step, gradient in enumerate(gradients, start=1):
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].double()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), SETTINGS["clip_grad"])))
        for group in optimizer.param_groups:
            group["lr"] = scheduled(step)
        optimizer.step()
        after.append({name: p.detach().clone() for name, p in parameters.items()})
    return after, norms


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "expert": 2}], ids=name_of)
def test_steps_are_those_of_adamw(layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]) -> None:
    ours = run(ranks, "answer_steps", layout, folder, steps=4, mini_batches=2, optimizer=SETTINGS)[0]
    expected, norms = replay(ours["weights"][0], ours["gradients"])
    assert ours["learning_rates"] == [scheduled(step) for step in (1, 2, 3, 4)]
    assert ours["grad_norms"] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 2 * SETTINGS["clip_grad"], "every step clips"
    for step, truth in enumerate(expected, start=1):
        assert ours["weights"][step].keys() == truth.keys()
        errors = {name: float((ours["weights"][step][name].double() - w).abs().max()) for name, w in truth.items()}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= 1e-6, (step, worst, errors[worst])


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ({}, {}),
        ({"tensor": 2, "expert": 2}, {}),
        ({"data": 2}, OVERLAP),
        ({"data": 2}, OWN),
        ({"data": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}, OVERLAP),
    ],
)
def test_a_step_that_is_left_out_leaves_no_trace(
    layout: dict[str, int], more: dict[str, Any], folder: str, ranks: Callable[[int], RankPool]
) -> None:
    for seen in run(ranks, "skipped_steps", layout, folder, optimizer=SETTINGS | more):
        assert seen["skipped"] == [False, True, True, True, False, False, False]
        assert not any(map(math.isfinite, seen["norms"][:2])) and math.isfinite(seen["norms"][2])
        assert seen["rates"][0] == seen["rates"][1] == [scheduled(1), scheduled(2)]
        assert seen["counts"][0] == seen["counts"][1] == {"optimizer_steps": 2, "schedule_steps": 2}
        for ours, spared in (seen["weights"], seen["states"]):
            assert ours.keys() == spared.keys()
            assert [name for name, tensor in ours.items() if not torch.equal(tensor, spared[name])] == []
        assert "the gradient norm of mini-batch 2 is nan: the weights are as they were before it" in seen["message"]
        assert seen["kept"]


@pytest.mark.parametrize("layout", [{}, {"data": 2}], ids=name_of)
def test_a_step_starts_from_no_gradient(layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]) -> None:
    ours = run(ranks, "answer_steps", layout, folder, steps=2, mini_batches=1, optimizer={"lr": 1e-12})[0]
    first, second = ours["gradients"]
    for name, gradient in first.items():
        assert (second[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name
    assert max(float(g.norm()) for g in first.values()) > 0.01


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=name_of)
def test_only_training_keeps_a_graph(layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]) -> None:
    for seen in run(ranks, "graph_of_layers", layout, folder):
        assert seen["logprobs"] and not any(seen["logprobs"])
        assert seen["train"] and all(seen["train"])


@pytest.mark.parametrize(
    "layout", [{"data": 2}, {"data": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}], ids=name_of
)
def test_a_pass_after_a_step_sees_the_parameters_that_are_gathered_late(
    layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]
) -> None:
    settings = {"lr": 1e-3, "eps": 1e-3}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    plain = run(ranks, "logprobs_between_steps", layout, folder, optimizer=settings)
    late = run(ranks, "logprobs_between_steps", layout, folder, optimizer=settings | overlap)
    for ours, theirs in zip(late, plain, strict=True):
        for after, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            moved = max(float((x - y).abs().max()) for x, y in zip(b, theirs[0], strict=True))
            assert after == 0 or moved > 1e-3
            assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [{"data": 2, "expert": 2}, {"data": 2, "pipeline": 2}, {"data": 2, "pipeline": 2, "virtual_pipeline": 2}],
    ids=name_of,
)
@pytest.mark.parametrize("gather", [False, True])
def test_overlap_waits_for_the_last_micro_batch(
    gather: bool, layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]
) -> None:
    settings = {"lr": 1e-3, "eps": 1e-3}
    overlap = settings | {"overlap_grad_reduce": True, "overlap_param_gather": gather}
    [plain, *_] = run(ranks, "steps_of_varying_size", layout, folder, optimizer=settings)
    [ours, *_] = run(ranks, "steps_of_varying_size", layout, folder, optimizer=overlap)
    assert ours["counts"] == plain["counts"] and len(set(plain["counts"])) > 1
    assert ours["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-5)
    for name, weight in plain["weights"].items():
        assert (ours["weights"][name] - weight).abs().max() <= 1e-6, name


@pytest.mark.parametrize("layout", [{"data": 2}, {"data": 2, "pipeline": 2}], ids=name_of)
def test_overlap_with_a_weight_that_is_embedding_and_head(
    layout: dict[str, int], tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    """The head adds its part of the gradient to the buffer itself, the embedding through autograd, on one stage or two;
    without overlap, with it, and with the definition's operations."""
    tied = str(tiny_models.write(tmp_path / "tied", "tied"))
    settings = {"lr": 1e-3, "eps": 1e-3}
    reference = settings | {"kernels": KernelsConfig(implementation="reference")}
    truth, *others = (
        run(ranks, "steps_of_varying_size", layout, tied, optimizer=optimizer)[0]
        for optimizer in (reference, settings, settings | {"overlap_grad_reduce": True})
    )
    for ours in others:
        assert ours["grad_norms"] == pytest.approx(truth["grad_norms"], rel=1e-5)
        for name, weight in truth["weights"].items():
            assert (ours["weights"][name] - weight).abs().max() <= 1e-6, name
