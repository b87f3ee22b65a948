"""Pickles of a checkpoint: what torch writes is read, all else is refused and nothing of it runs."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.unpickle import METADATA, load_metadata, load_weights_only


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint written by torch itself."""
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "object": {"step": 3}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_metadata_of_torch_is_what_torch_reads(folder: Path) -> None:
    found, expected = load_metadata(folder), FileSystemReader(folder).read_metadata()
    assert type(found) is Metadata
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert found.planner_data == expected.planner_data


def test_metadata_of_older_megatron_is_torchs_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core 0.15 pickled an empty subclass."""
    place = "megatron.core.dist_checkpointing.strategies.torch"
    older = type("MCoreMetadata", (Metadata,), {"__module__": place})
    stand_in = ModuleType(place)
    stand_in.MCoreMetadata = older  # type: ignore[attr-defined]
    found = load_metadata(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, place, stand_in)
        (folder / METADATA).write_bytes(pickle.dumps(older(found.state_dict_metadata)))
    again = load_metadata(folder)
    assert type(again) is Metadata and again.state_dict_metadata == found.state_dict_metadata


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that create `marker`, or would give their author a way to."""
    touch = f"touch {marker}"
    place = b"\x80\x02ctorch.distributed.checkpoint.metadata"
    return {
        "os.system": pickle.dumps(Calls(os.system, touch)),
        "inside a Metadata": pickle.dumps(Metadata({"a": Calls(os.system, touch)})),  # type: ignore[dict-item]
        "eval": pickle.dumps(Calls(eval, f"__import__('os').system({touch!r})")),
        "getattr": pickle.dumps(Calls(getattr, Path, "unlink")),
        "torch.load": pickle.dumps(Calls(torch.load, str(marker))),
        "open": pickle.dumps(Calls(open, str(marker), "w")),
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0aSize.count\x93.",
        "instance": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "persistent": b"Pos.system\n.",
        "extension": b"\x80\x02\x82\x01.",
    } | {
        # BUILD with a state of slots sets attributes of whatever is on the stack: here of the class itself.
        "a class's attribute": place + b"\nTensorProperties\nN}X\x05\x00\x00\x00dtypeK\x07s\x86b.",
        "a class's method": place + b"\nMetadata\nN}X\x0c\x00\x00\x00__setstate__ctorch\nSize\ns\x86b.",
    }


@pytest.mark.parametrize("name", attacks(Path("/marker")))
def test_an_attack_is_refused_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / METADATA).write_bytes(attacks(marker)[name])
    with pytest.raises(UserError) as error:
        load_metadata(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / METADATA} is no metadata of a torch_dist checkpoint: ")
    assert not marker.exists()
    assert not hasattr(Metadata, "__setstate__") and not hasattr(TensorProperties, "dtype")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"K\x01.", b"N.", b"}.", b"\x80\x04\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x0f", b"(" * 9],
)
def test_a_damaged_pickle_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is no metadata of a torch_dist checkpoint"):
        load_metadata(tmp_path)


def test_every_truncation_is_refused(folder: Path) -> None:
    data = (folder / METADATA).read_bytes()
    for length in range(0, len(data) - 1, 97):
        (folder / METADATA).write_bytes(data[:length])
        with pytest.raises(UserError):
            load_metadata(folder)


def test_a_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata is missing: .* is no torch_dist checkpoint"):
        load_metadata(tmp_path)


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_tensors_and_plain_values_are_loaded() -> None:
    value = {"step": 3, "list": [1, "a", None], "tensor": torch.arange(3)}
    found = load_weights_only(io.BytesIO(saved(value)), "entry")
    assert found["step"] == 3 and found["list"] == [1, "a", None]
    assert torch.equal(found["tensor"], torch.arange(3))


@pytest.mark.parametrize("kind", ["saved", "pickle", "truncated", "empty", "missing"])
def test_anything_else_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "common.pt"
    attack = Calls(os.system, f"touch {marker}")
    contents = {
        "saved": saved({"a": attack}),
        "pickle": pickle.dumps(attack),
        "truncated": saved(torch.ones(100))[:300],
        "empty": b"",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(UserError) as error:
        load_weights_only(path, str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not marker.exists()
