"""Where a result may be written: what --overwrite may replace."""

from __future__ import annotations

import filecmp
import json
import os
import re
from pathlib import Path

from gspo_megatron.errors import UserError
from gspo_megatron.weights.hf_checkpoint import COMPANIONS, INDEX, SINGLE, companions_of
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, read_checksums
from gspo_megatron.weights.torch_dist.description import HF_FOLDER, read_description

_OWN = re.compile(
    r"gspo_megatron\.json|checksums\.json|hf_layout\.json|trainer\.json|random\.json|metadata\.json|\.metadata"
    r"|common\.pt|__\d+_\d+\.distcp"
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Raise UserError where the result must not be written."""
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise UserError(f"{target} and {source} lie in each other; choose another folder for the result")
    if target.name in ("", ".."):
        raise UserError(f"{target} is no name of a folder; give the result one")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} is no folder that can be written to; choose another place for {target.name}")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another folder or give --overwrite")
    if target.is_symlink() or not target.is_dir() or not (_is_ours(target) or _is_hf(target)):
        raise UserError(
            f"{target} is no checkpoint, so --overwrite leaves it alone; remove it or choose another folder"
        )
    if foreign := _foreign(target, source):
        raise UserError(
            f"{target / foreign} is no part of a checkpoint, and --overwrite would remove it with {target}; move it "
            "away or choose another folder"
        )


def _is_ours(folder: Path) -> bool:
    try:
        read_description(folder)
    except UserError:
        return False
    return True


def _is_hf(folder: Path) -> bool:
    """A config of a model, and weights."""
    config = _read(folder / "config.json")
    return isinstance(config.get("model_type"), str) and any((folder / name).is_file() for name in (SINGLE, INDEX))


def _foreign(folder: Path, source: Path) -> str | None:
    """A file or folder that no checkpoint of either format holds, and that the result won't hold again."""
    ours, weights, known = _is_ours(folder), {SINGLE, INDEX}, set(COMPANIONS)
    weight_map = _read(folder / INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        weights |= {name for name in weight_map.values() if isinstance(name, str) and name.endswith(".safetensors")}
    if ours and (folder / CHECKSUMS).is_file():
        known |= read_checksums(folder).keys()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if name != HF_FOLDER or not ours:
                return name
        elif name in known or name.removeprefix(f"{HF_FOLDER}/") in COMPANIONS or _same(path, source):
            continue
        elif not (name in weights or _SHARD.fullmatch(name) or (ours and _OWN.fullmatch(name))):
            return name
    return None


def _same(path: Path, source: Path) -> bool:
    """Whether the source has the file too, among those that are copied."""
    folder = source / HF_FOLDER if (source / HF_FOLDER).is_dir() else source
    if not (folder / path.name).is_file() or path.is_symlink() or path.name not in companions_of(folder):
        return False
    return filecmp.cmp(path, folder / path.name, shallow=False)


def _read(path: Path) -> dict[str, object]:
    """Of a JSON file; {} where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
