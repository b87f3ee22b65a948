"""Reading the pickles of a torch_dist checkpoint without running what they say.

`.metadata` is a pickle of torch's own classes: it is read by an unpickler that knows these and nothing else. All other
pickles of a checkpoint, common.pt and the entries of *.distcp, are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from gspo_megatron.errors import UserError

METADATA = ".metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

_CLASSES: dict[tuple[str, str], type] = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        metadata: (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
        filesystem: ("_StorageInfo", "_StoragePrefix"),
    }.items()
    for name in names
}  # fmt: skip
# Empty subclasses that Megatron-Core 0.15 and before wrote.
_CLASSES |= {(_MEGATRON, "MCoreMetadata"): Metadata, (_MEGATRON, "MCoreSavePlan"): planner.SavePlan}
_DTYPES = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
ALLOWED: dict[tuple[str, str], Any] = {
    **_CLASSES, **_DTYPES, ("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): _get_layout,
    # The folder's own path, where it was saved by one that was no str.
    ("pathlib", "PosixPath"): PurePosixPath, ("pathlib._local", "PosixPath"): PurePosixPath,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return ALLOWED[module, name]


def load_metadata(folder: Path) -> Metadata:
    """`.metadata` of a folder, as torch's own class. Nothing that it names is run but constructors of `ALLOWED`.

    Raises UserError, naming the file, where it is missing, damaged or holds anything else.
    """
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is no torch_dist checkpoint, or one whose saving was cut off")
    return unpickle_metadata(path.read_bytes(), path)


def unpickle_metadata(data: bytes, path: Path) -> Metadata:
    """The same of the file's bytes; `path` is for messages."""
    before = {cls: dict(vars(cls)) for cls in set(_CLASSES.values())}
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except (Exception, MemoryError) as error:  # a pickle can raise anything: whatever it is, the file is refused
        raise UserError(f"{path} is no metadata of a torch_dist checkpoint: {error}") from None
    finally:
        changed = _restore(before)
    if changed or type(found) is not Metadata:
        what = f"it changes {', '.join(changed)}" if changed else f"it holds a {type(found).__name__}"
        raise UserError(f"{path} is no metadata of a torch_dist checkpoint: {what}")
    return found


def _restore(before: dict[type, dict[str, Any]]) -> list[str]:
    """Undo what a pickle has done to the classes themselves: its BUILD sets attributes on any object. Their names."""
    changed = []
    for cls, attributes in before.items():
        for name in vars(cls).keys() | attributes.keys():
            if name not in attributes:
                delattr(cls, name)
            elif vars(cls).get(name) is not attributes[name]:
                setattr(cls, name, attributes[name])
            else:
                continue
            changed.append(f"{cls.__name__}.{name}")
    return changed


def load_weights_only(source: Path | IO[bytes], name: str) -> Any:
    """`torch.load` that builds tensors and plain values only, on the CPU. `name` is for messages.

    Raises UserError where the file is damaged or holds anything else.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{name} is missing") from None
    except (Exception, MemoryError) as error:  # as above
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} can't be read as tensors and plain values: {reason}") from None
