"""The memory estimate against the bytes of real models: parameters, gradients, optimizer, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gspo_megatron.config import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.memory_estimate import estimate
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families import load_fields
from tests.distributed import family_models, tiny_models
from tests.distributed.rank_pool import RankPool

LENGTHS = [96, 96, 64]  # what activations are per token; the attention's masks beside them are small
CASES: list[tuple[str, dict[str, int], str, bool]] = [
    ("moe", {}, "float32", True),
    ("moe", {"tensor": 2, "expert": 2, "data": 2}, "bfloat16", True),
    ("moe", {"tensor": 2, "expert": 2, "data": 2}, "float32", False),
    ("mixed", {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2}, "bfloat16", True),
    ("dense", {"pipeline": 2, "tensor": 2}, "float32", True),
    ("tied", {"context": 2}, "float32", True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kinds = ("moe", "mixed", "dense", "tied")
    return {kind: str(tiny_models.write(tmp_path_factory.mktemp("model") / kind, kind)) for kind in kinds}


def config(folder: str, layout: dict[str, int], dtype: str, distributed: bool, recompute: str, tokens: int) -> Any:
    return TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=folder, dtype=dtype),  # type: ignore[arg-type]
        task=TaskConfig(name="reasoning_gym"),
        parallel=ParallelConfig(**layout),
        optimizer=OptimizerConfig(distributed=distributed),
        memory=MemoryConfig(recompute=recompute),  # type: ignore[arg-type]
        data=DataConfig(token_budget=tokens),
    )


def measure(
    ranks: Callable[[int], RankPool], folder: str, layout: dict[str, int], dtype: str, distributed: bool, recompute: str
) -> list[dict[str, int]]:
    return ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.memory_cases:held_bytes",
        layout=layout,
        folder=folder,
        vocab=tiny_models.VOCAB,
        lengths=LENGTHS * layout.get("data", 1),
        dtype=dtype,
        distributed=distributed,
        recompute=recompute,
    )


@pytest.mark.parametrize(("kind", "layout", "dtype", "distributed"), CASES)
def test_parameters_gradients_and_optimizer(
    ranks: Callable[[int], RankPool],
    folders: dict[str, str],
    kind: str,
    layout: dict[str, int],
    dtype: str,
    distributed: bool,
) -> None:
    folder, degrees = folders[kind], ParallelLayout(**layout)
    measured = measure(ranks, folder, layout, dtype, distributed, "none")
    stages = estimate(config(folder, layout, dtype, distributed, "none", sum(LENGTHS)), *load_fields(folder))
    for rank, found in enumerate(measured):
        stage = stages[degrees.coordinates(rank).pipeline]
        assert (found["parameters"], found["gradients"]) == (stage.parameters, stage.gradients)
    # Ranks that share optimizer state out have pieces of different lengths.
    for number, stage in enumerate(stages):
        ours = [m["optimizer"] for r, m in enumerate(measured) if degrees.coordinates(r).pipeline == number]
        assert sum(ours) == pytest.approx(len(ours) * stage.optimizer, abs=1)


@pytest.mark.parametrize("family", family_models.CLASSES)
def test_parameters_of_every_family(
    ranks: Callable[[int], RankPool], family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("family") / family)
    family_models.make_config(family).save_pretrained(folder)
    layout = {"tensor": 2} | ({"expert": 2} if load_fields(folder)[1].num_experts else {})
    measured = ranks(2).run("tests.distributed.memory_cases:parameter_bytes", layout=layout, folder=folder)
    [stage] = estimate(config(folder, layout, "float32", True, "none", 1), *load_fields(folder))
    assert measured == [stage.parameters] * 2


@pytest.mark.parametrize(
    ("kind", "layout", "recompute"),
    [
        ("moe", {}, "none"),
        ("moe", {}, "selective"),
        ("dense", {}, "none"),
        ("moe", {"tensor": 2, "expert": 2}, "none"),
    ],
)
def test_activations(
    ranks: Callable[[int], RankPool], folders: dict[str, str], kind: str, layout: dict[str, int], recompute: str
) -> None:
    measured = measure(ranks, folders[kind], layout, "float32", True, recompute)
    made = config(folders[kind], layout, "float32", True, recompute, measured[0]["tokens"])
    [stage] = estimate(made, *load_fields(folders[kind]))
    mean = sum(m["activations"] for m in measured) / len(measured)
    assert stage.activations == pytest.approx(mean, rel=0.2)
