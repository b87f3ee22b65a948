"""Checkpoints of the policy in every kind of layout, with every kind of optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_files import differing
from tests.distributed import family_models, tiny_models
from tests.distributed.conftest import ranks as ranks_fixture
from tests.distributed.test_checkpoint import Ranks, check_next_step, check_there_and_back, equal, load, name_of, save
from tests.distributed.test_checkpoint import moe as moe_fixture
from tests.distributed.test_checkpoint import one_rank as one_rank_fixture

ranks, moe, one_rank = ranks_fixture, moe_fixture, one_rank_fixture
pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]
LAYOUTS: list[dict[str, int]] = [
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"data": 2},
    {"data": 2, "expert": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"context": 2},
    {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
    {"tensor": 2, "pipeline": 2, "expert": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_any_layout_loads_and_saves_the_same_bits(
    layout: dict[str, int], moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    check_there_and_back(layout, moe, one_rank, tmp_path, ranks)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "data": 2, "expert": 2}], ids=name_of)
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": {"distributed": False}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"dtype": "bfloat16"}, "optimizer": {"distributed": False}},
        {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
        {"model": {"dtype": "bfloat16"}, "memory": {"offload_gradients": True}},
        {"model": {"experts": "sequential"}},
    ],
    ids=str,
)
def test_the_next_step_is_bitwise_that_of_a_run_without_a_break(
    settings: dict[str, Any], layout: dict[str, int], moe: Path, tmp_path: Path, ranks: Ranks
) -> None:
    check_next_step(settings, layout, moe, tmp_path, ranks)


def test_the_kind_of_optimizer_may_change(
    moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    saved, known = one_rank
    loaded = load(ranks, {}, moe, saved, tmp_path / "again", optimizer={"distributed": False})
    assert differing(saved, tmp_path / "again") == []
    worst = max(float((loaded["after"][n] - w).abs().max()) for n, w in known["after"].items())
    assert worst <= 1e-6  # the norm of the gradient is summed in another order


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_tied_weights_and_dense_layers(kind: str, tmp_path: Path, ranks: Ranks) -> None:
    folder = tiny_models.write(tmp_path / kind, kind)
    known = save(ranks, {"pipeline": 2, "data": 2}, folder, tmp_path / "saved")
    loaded = load(ranks, {"tensor": 2}, folder, tmp_path / "saved", tmp_path / "again")
    assert differing(tmp_path / "saved", tmp_path / "again") == []
    assert equal(loaded["weights"], known["weights"])


@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_every_family_moves_between_layouts(family: str, tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "model"
    family_models.make(family).save_pretrained(folder)
    experts = {} if family == "qwen3" else {"expert": 2}
    known = save(ranks, {"tensor": 2} | experts, folder, tmp_path / "saved")
    loaded = load(ranks, {"pipeline": 2}, folder, tmp_path / "saved", tmp_path / "again")
    assert differing(tmp_path / "saved", tmp_path / "again") == []
    assert equal(loaded["weights"], known["weights"])
    assert loaded["norms"] == pytest.approx(known["norms"], rel=1e-4)
