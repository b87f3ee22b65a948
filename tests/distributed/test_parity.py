"""Megatron equals transformers: logits in float32, weights bit for bit, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import tiny_models
from tests.distributed.rank_pool import RankPool

LAYOUTS = [
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"tensor": 2, "expert": 2},
    {"data": 2, "expert": 2},
    {"data": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "data": 2, "expert": 2},
    {"tensor": 2, "data": 2, "expert": 4},
    {"pipeline": 4},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2},
    {"context": 2},
    {"context": 4, "expert": 4},
    {"context": 2, "tensor": 2},
    {"context": 2, "pipeline": 2},
    {"context": 2, "data": 2, "expert": 2, "expert_tensor": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
]
DENSE_LAYOUTS = [
    layout for layout in LAYOUTS if not {"expert", "expert_tensor"} & layout.keys() and layout.get("pipeline") != 4
]
MIXED_LAYOUTS = [{}, {"pipeline": 2}, {"tensor": 2, "expert": 2}]
CASES = [
    *(("moe", layout) for layout in LAYOUTS),
    *(("mixed", layout) for layout in MIXED_LAYOUTS),
    *((kind, layout) for kind in ("dense", "tied") for layout in DENSE_LAYOUTS),
]
LENGTHS = [7, 3, 12, 5, 9, 2, 15, 6]


def name_of(layout: dict[str, int]) -> str:
    return ParallelLayout(**layout).describe()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: tiny_models.write(base / kind, kind) for kind in ("moe", "mixed", "dense", "tied")}


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_logits_equal_transformers(
    kind: str, layout: dict[str, int], folders: dict[str, Path], ranks: Callable[[int], RankPool]
) -> None:
    pool = ranks(ParallelLayout(**layout).world_size)
    results = pool.run(
        "tests.distributed.cases:logits",
        layout=layout,
        folder=str(folders[kind]),
        lengths=LENGTHS,
        vocab=tiny_models.VOCAB,
    )
    ours = {i: torch.full((n, tiny_models.VOCAB), torch.nan) for i, n in enumerate(LENGTHS)}
    for part in filter(None, results):
        for index, (positions, values) in part.items():
            ours[index][positions] = values
    model = tiny_models.make(kind)
    for sequence in tiny_models.make_sequences(LENGTHS, tiny_models.VOCAB, seed=3):
        with torch.no_grad():
            theirs = model(input_ids=sequence.token_ids[None]).logits[0]
        assert theirs.abs().max() > 0.5
        assert (ours[sequence.index] - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_round_trip_is_bitwise_and_only_heads_hold_the_model(
    kind: str, layout: dict[str, int], folders: dict[str, Path], ranks: Callable[[int], RankPool]
) -> None:
    degrees = ParallelLayout(**layout)
    results = ranks(degrees.world_size).run(
        "tests.distributed.cases:round_trip", layout=layout, folder=str(folders[kind])
    )
    disk = load_file(folders[kind] / "model.safetensors")
    whole = sum(t.numel() for t in disk.values())
    for result in results:
        if result["is_head"]:
            assert result["exported"].keys() == disk.keys()
            for name, tensor in disk.items():
                assert torch.equal(result["exported"][name], tensor), name
        else:
            assert result["exported"] == {} and result["received_bytes"] == 0
        if degrees.tensor * degrees.pipeline * degrees.expert > 1:
            assert result["local_numel"] < whole
    assert sum(r["is_head"] for r in results) == degrees.data


def test_saved_folder_is_bitwise_the_one_loaded(
    folders: dict[str, Path], ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    layout = {"tensor": 2, "data": 2, "expert": 4}
    ranks(4).run("tests.distributed.cases:save", layout=layout, folder=str(folders["moe"]), out=str(out))
    saved, original = load_file(out / "model.safetensors"), load_file(folders["moe"] / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    assert (out / "config.json").read_bytes() == (folders["moe"] / "config.json").read_bytes()
