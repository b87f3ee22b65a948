"""Checkpoints of the policy: what one layout saves, another loads bit for bit, optimizer state included.

All layouts and settings: tests/system/test_checkpoint_layouts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.parallel import ParallelLayout
from tests.checkpoint_files import differing, read_tensors
from tests.distributed import tiny_models
from tests.distributed.checkpoint_cases import COUNTS
from tests.distributed.rank_pool import RankPool

Ranks = Callable[[int], RankPool]


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


def run(ranks: Ranks, case: str, layout: dict[str, int], folder: Path, **arguments: Any) -> dict[str, Any]:
    pool = ranks(ParallelLayout(**layout).world_size)
    return pool.run(f"tests.distributed.checkpoint_cases:{case}", layout=layout, folder=str(folder), **arguments)[0]


def save(ranks: Ranks, layout: dict[str, int], folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return run(ranks, "train_and_save", layout, folder, vocab=tiny_models.VOCAB, out=str(out), **settings)


def load(ranks: Ranks, layout: dict[str, int], folder: Path, saved: Path, out: Path, **settings: Any) -> dict[str, Any]:
    arguments = {"vocab": tiny_models.VOCAB, "saved": str(saved), "out": str(out), **settings}
    return run(ranks, "load_and_save", layout, folder, **arguments)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("model") / "moe", "moe")


@pytest.fixture(scope="module")
def one_rank(moe: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of one rank, and what that rank knew."""
    out = tmp_path_factory.mktemp("one_rank") / "saved"
    return out, save(ranks, {}, moe, out)


def check_there_and_back(
    layout: dict[str, int], moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    """One rank's checkpoint through another layout and back."""
    saved, known = one_rank
    loaded = load(ranks, layout, moe, saved, tmp_path / "again")
    assert differing(saved, tmp_path / "again") == []
    assert equal(loaded["weights"], known["weights"])
    assert json.loads((tmp_path / "again" / COUNTS).read_text()) == {"optimizer_steps": 2, "schedule_steps": 2}
    # The step that follows is the same but for the order of sums: a lost or misplaced moment would show.
    assert loaded["norms"] == pytest.approx(known["norms"], rel=1e-5)
    worst = max(float((loaded["after"][n] - w).abs().max()) for n, w in known["after"].items())
    assert worst <= 1e-5
    back = load(ranks, {}, moe, tmp_path / "again", tmp_path / "back")
    assert differing(saved, tmp_path / "back") == []
    assert equal(back["after"], known["after"])


def check_next_step(settings: dict[str, Any], layout: dict[str, int], moe: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The step after loading is bitwise that of a run without a break."""
    known = save(ranks, layout, moe, tmp_path / "saved", **settings)
    loaded = load(ranks, layout, moe, tmp_path / "saved", tmp_path / "again", **settings)
    assert differing(tmp_path / "saved", tmp_path / "again") == []
    assert loaded["norms"] == known["norms"]
    assert equal(loaded["weights"], known["weights"]) and equal(loaded["after"], known["after"])
    assert not equal(known["after"], known["weights"]), "the third step moved the weights"
    has_main = any(name.startswith("optimizer.state.param.") for name in read_tensors(tmp_path / "saved"))
    assert has_main == (settings.get("model", {}).get("dtype") == "bfloat16")


def test_another_layout_loads_and_saves_the_same_bits(
    moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    check_there_and_back({"tensor": 2, "expert": 2}, moe, one_rank, tmp_path, ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_step_is_bitwise_that_of_a_run_without_a_break(
    dtype: str, moe: Path, tmp_path: Path, ranks: Ranks
) -> None:
    check_next_step({"model": {"dtype": dtype}}, {"data": 2}, moe, tmp_path, ranks)


def test_weights_alone_start_a_new_optimizer(
    moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    saved, known = one_rank
    loaded = load(ranks, {"tensor": 2}, moe, saved, tmp_path / "again", weights_only=True)
    assert equal(loaded["weights"], known["weights"])
    tensors = read_tensors(tmp_path / "again")
    assert not any(value.any() for name, value in tensors.items() if name.startswith("optimizer.state.exp_avg"))
    assert json.loads((tmp_path / "again" / COUNTS).read_text()) == {"optimizer_steps": 0, "schedule_steps": 2}


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "expert": 2}], ids=name_of)
def test_megatron_s_own_loader_reads_the_weights(
    layout: dict[str, int], moe: Path, one_rank: tuple[Path, dict[str, Any]], ranks: Ranks
) -> None:
    saved, known = one_rank
    assert equal(run(ranks, "load_with_megatron", layout, moe, saved=str(saved)), known["weights"])


def test_another_model_is_refused(
    moe: Path, one_rank: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: Ranks
) -> None:
    dense = tiny_models.write(tmp_path / "dense", "dense")
    refusals = [
        run(ranks, "refusal", {}, folder, saved=str(one_rank[0]), **settings)
        for folder, settings in ((dense, {}), (moe, {"model": {"dtype": "bfloat16"}}))
    ]
    assert "lacks 24 tensors: decoder.layers.mlp.linear_fc1.layer_norm_weight" in refusals[0]
    assert "set model.dtype alike" in refusals[1]
