"""More than 200 broken checkpoints and configs: each is refused by one message that names the file; no code runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.errors import UserError
from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.hf_checkpoint import HFCheckpoint
from tests.unit.weights import corrupt_checkpoints
from tests.unit.weights.conversion_setup import CONFIG, contents, to_megatron, write_hf
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound folders of each kind."""
    base = tmp_path_factory.mktemp("good")
    folders = {"hf": write_hf(base / "hf"), "sharded": write_hf(base / "sharded", files=2)}
    folders["dist"] = to_megatron(folders["hf"], base / "dist")
    settings = {"quantization_config": {"weight_block_size": [128, 128]}}
    folders["scaled"] = write_hf(base / "scaled", CONFIG | settings)
    path = folders["scaled"] / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(1, 1)}, path)
    return folders


def attempt(folder: Path, out: Path, kind: str) -> int:
    return convert_checkpoint.main(["export" if kind == "dist" else "import", str(folder), str(out)])


@pytest.mark.parametrize("kind", ["hf", "sharded", "scaled", "dist"])
def test_the_sound_folders_are_converted(kind: str, good: dict[str, Path], tmp_path: Path) -> None:
    assert attempt(good[kind], tmp_path / "out", kind) == 0


def test_at_least_200_of_them_are_different(good: dict[str, Path], tmp_path: Path) -> None:
    seen = set()
    for case in corrupt_checkpoints.cases():
        folder = shutil.copytree(good[case.kind], tmp_path / "x")
        case.harm(folder, corrupt_checkpoints.generator(case), Path("/marker"))
        files = contents(folder) if folder.exists() else {}
        links = tuple(sorted(str(p) for p in folder.rglob("*") if p.is_symlink() or p.is_dir()))
        seen.add((case.kind, str(sorted(files.items())), links))
        shutil.rmtree(folder)
        for path in tmp_path.iterdir():
            path.unlink()
    assert len(seen) >= 200


@pytest.mark.parametrize("case", corrupt_checkpoints.cases(), ids=lambda case: case.name)
def test_a_broken_folder_is_refused(
    case: corrupt_checkpoints.Case, good: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    folder = shutil.copytree(good[case.kind], tmp_path / "model")
    case.harm(folder, corrupt_checkpoints.generator(case), marker)
    code = attempt(folder, tmp_path / "out", case.kind)
    said = capfd.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert code == 2, said
    assert len(errors) == 1 and "Traceback" not in "".join(said), said
    assert str(folder / case.named if case.named else folder) in errors[0], errors[0]
    assert len(errors[0]) < 2000
    assert not marker.exists(), "code of the file has run"
    assert not (tmp_path / "out").exists()
    # The other commands refuse it alike, and the reader that training uses.
    for command in (["inspect"], ["verify", str(good["hf"])]):
        assert convert_checkpoint.main([*command, str(folder)]) in (0, 1, 2)
    if case.kind != "dist" and case.harm is not corrupt_checkpoints.companion_link:  # the reader copies nothing
        with pytest.raises(UserError):
            family, fields = load_fields(folder)
            HFCheckpoint(folder).verify(family.specs(fields))
    assert not marker.exists()


def test_a_snapshot_of_the_hugging_face_cache_is_read(good: dict[str, Path], tmp_path: Path) -> None:
    """Its files are links into a folder beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(good["sharded"].iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert attempt(snapshot, tmp_path / "out", "hf") == 0
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text()) == CONFIG
