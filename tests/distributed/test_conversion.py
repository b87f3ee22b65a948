"""Checkpoints of the conversion are Megatron's own: what either writes the other reads, bit for bit, in any layout."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.conversion.execute import execute
from gspo_megatron.weights.conversion.models import HFModel, TorchDistModel
from gspo_megatron.weights.conversion.to_hf import ToHF
from gspo_megatron.weights.conversion.to_megatron import ToMegatron
from gspo_megatron.weights.families import FAMILIES
from tests.distributed import family_models, tiny_models
from tests.distributed.rank_pool import RankPool

DENSE = ("dense", "tied", "qwen3")
KINDS = ("mixed", "dense", "tied", *FAMILIES)  # models of Qwen3's families with more than one kind of layer or head
LAYOUTS = [{}, {"tensor": 2, "expert": 2}, {"pipeline": 2}]


class Silent:
    def advance(self, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...


def write(folder: Path, kind: str) -> Path:
    """A tiny model of a family, or of those of tiny_models."""
    if kind in FAMILIES:
        assert kind in family_models.CONFIGS, f"{kind} needs a tiny model in family_models.py"
        family_models.make(kind).save_pretrained(folder)
        return folder
    return tiny_models.write(folder, kind)


def cases(layouts: list[dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    return [
        (kind, {k: v for k, v in layout.items() if kind not in DENSE or k != "expert"})
        for kind in KINDS
        for layout in layouts
    ]


def name_of(value: object) -> str:
    return ParallelLayout(**value).describe() if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base, made = tmp_path_factory.mktemp("models"), {}

    def folder(kind: str) -> Path:
        """The HF folder; beside it, as `KIND.dist`, what the conversion made of it."""
        if kind not in made:
            made[kind] = write(base / kind, kind)
            conversion = ToMegatron(HFModel(made[kind]), file_bytes=100_000, chunk_bytes=5000)
            assert len(conversion.files) > 1
            execute(conversion, base / f"{kind}.dist", report=Silent())
        return made[kind]

    return folder


@pytest.mark.parametrize(("kind", "layout"), cases(LAYOUTS), ids=name_of)
def test_megatron_loads_what_the_conversion_wrote(
    kind: str, layout: dict[str, int], folders: Callable[[str], Path], ranks: Callable[[int], RankPool]
) -> None:
    """With strict handling: every key and object that Megatron wants is there, and no other."""
    source = folders(kind)
    differing = ranks(ParallelLayout(**layout).world_size).run(
        "tests.distributed.conversion_cases:load",
        layout=layout,
        folder=str(source),
        checkpoint=str(source.with_name(f"{kind}.dist")),
    )
    assert not any(differing), differing


SAVES = [
    *(("save", *case) for case in [*cases(LAYOUTS[1:2]), ("mixed", LAYOUTS[2]), ("tied", LAYOUTS[2])]),
    ("save_training", "mixed", LAYOUTS[1]),
    ("save_training", "deepseek_v3", LAYOUTS[1]),
    ("save_training", "tied", LAYOUTS[2]),
]


@pytest.mark.parametrize(("case", "kind", "layout"), SAVES, ids=name_of)
def test_what_megatron_or_training_saved_is_exported_as_it_was(
    case: str,
    kind: str,
    layout: dict[str, int],
    folders: Callable[[str], Path],
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
) -> None:
    source, saved = folders(kind), tmp_path / "saved"
    ranks(ParallelLayout(**layout).world_size).run(
        f"tests.distributed.conversion_cases:{case}", layout=layout, folder=str(source), out=str(saved), dtype="float32"
    )
    model = TorchDistModel(saved)
    execute(ToHF(model), tmp_path / "hf", report=Silent())
    ours, original = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", source))
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)
    assert filecmp.cmp(tmp_path / "hf" / "config.json", source / "config.json", shallow=False)
    # The conversion writes the same keys, shapes and objects.
    converted = TorchDistModel(source.with_name(f"{kind}.dist")).checkpoint
    assert model.checkpoint.objects == converted.objects
    assert model.checkpoint.tensors.keys() - set(model.others) == converted.tensors.keys()
    assert bool(model.others) == (case == "save_training"), "the optimizer's state is there too, and stays behind"
    for key, tensor in converted.tensors.items():
        found = model.checkpoint.tensors[key]
        assert found.dtype == tensor.dtype
        # Megatron pads a vocabulary to a multiple of the tensor-parallel degree.
        assert found.shape == tensor.shape or (found.shape[0] == 132 and tensor.shape[0] == tiny_models.VOCAB), key
