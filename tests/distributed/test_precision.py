"""bfloat16 models: float32 where GSPO's clip needs it, and the same experts whichever kernels compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_training import CONFIG

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "quickstart" / "model")
LAYOUTS = [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "data": 2, "expert": 2}]


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.write(tmp_path_factory.mktemp("model") / "moe", "moe"))


def head_errors(
    ranks: Callable[[int], RankPool], layout: dict[str, int], folder: str, rounded: bool
) -> tuple[list[float], list[float]]:
    results = ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.precision_cases:head_errors",
        layout=layout,
        folder=folder,
        vocab=tiny_models.VOCAB,
        rounded=rounded,
    )
    log_ratios = [x for r in results for x in r["log_ratio"]]
    assert len(log_ratios) == 8
    assert max(map(abs, log_ratios)) > 1e-3, "the models differ by more than the clip"
    return log_ratios, [x for r in results for x in r["errors"]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_log_s_is_that_of_a_float32_head(layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]) -> None:
    assert max(head_errors(ranks, layout, folder, rounded=False)[1]) <= 2e-5


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=name_of)
def test_a_head_rounded_to_bfloat16_is_noticed(
    layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]
) -> None:
    assert max(head_errors(ranks, layout, folder, rounded=True)[1]) > 2e-4, "as wide as the clip"


@pytest.mark.parametrize("layout", [{}, {"data": 2, "expert": 2}], ids=name_of)
def test_gradients_and_main_parameters_are_float32(
    layout: dict[str, int], folder: str, ranks: Callable[[int], RankPool]
) -> None:
    for dtypes in ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.precision_cases:optimizer_dtypes", layout=layout, folder=folder
    ):
        assert dtypes == {"parameters": {torch.bfloat16}, "gradients": {torch.float32}, "main": {torch.float32}}


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2, "expert": 2}, {"context": 2, "pipeline": 2, "expert": 2}],
    ids=name_of,
)
def test_first_mini_batch_is_on_policy(layout: dict[str, int], ranks: Callable[[int], RankPool]) -> None:
    config = {**CONFIG, "model": {**CONFIG["model"], "dtype": "bfloat16"}}
    results = ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.cases:first_batch", layout=layout, config=config
    )
    first, second = ([x for r in results if r["log_ratio"] for x in r["log_ratio"][j]] for j in (0, 1))
    assert len(first) >= 16 and max(map(abs, first)) <= 1e-6
    assert max(map(abs, second)) > 1e-4


@pytest.fixture(scope="module")
def step(folder: str, ranks: Callable[[int], RankPool]) -> Callable[..., dict[str, Any]]:
    """step(layout, **settings): rank 0's results of one GSPO step on the batch of hard cases."""

    def run(layout: dict[str, int], **settings: dict[str, Any]) -> dict[str, Any]:
        [first, *_] = ranks(ParallelLayout(**layout).world_size).run(
            "tests.distributed.cases:optimizer_step",
            layout=layout,
            folder=folder,
            tokenizer=TOKENIZER,
            algorithm={"name": "gspo"},
            token_budget=24,
            batch="edge",
            vocab=tiny_models.VOCAB,
            settings=settings,
        )
        return first

    return run


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of a tensor, and its name."""
    assert ours.keys() == theirs.keys()
    return max(
        (float((ours[n].double() - t.double()).norm() / t.double().norm().clamp(min=1e-8)), n)
        for n, t in theirs.items()
    )


EXPERT_LAYOUTS: list[dict[str, int]] = [
    {},
    {"data": 2, "expert": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "data": 2, "expert": 2},
]
EXPERT_CASES = [
    *(("float32", 1e-5, layout) for layout in EXPERT_LAYOUTS),
    # Here an expert's share, 24 / 2 values, is a multiple of 16 bytes in float32 alone.
    ("float32", 1e-5, {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2}),
    *(("bfloat16", 2**-8, layout) for layout in EXPERT_LAYOUTS),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "layout"), EXPERT_CASES, ids=lambda x: name_of(x) if isinstance(x, dict) else str(x)
)
def test_grouped_experts_step_like_sequential_ones(
    dtype: str, tolerance: float, layout: dict[str, int], step: Callable[..., dict[str, Any]]
) -> None:
    """One micro-batch has eight tokens for eight experts."""
    grouped = step(layout, model={"dtype": dtype, "experts": "grouped"})
    sequential = step(layout, model={"dtype": dtype, "experts": "sequential"})
    assert difference(grouped["gradients"], sequential["gradients"])[0] <= tolerance
    assert grouped["grad_norm"] == pytest.approx(sequential["grad_norm"], rel=tolerance)
    assert grouped["loss"] == pytest.approx(sequential["loss"], rel=tolerance, abs=1e-7)
    before = max(float(w.abs().max()) for w in sequential["weights"].values())
    assert before > 0.1
    assert difference(grouped["weights"], sequential["weights"])[0] <= tolerance
