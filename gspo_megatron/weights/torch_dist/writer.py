"""Planning the files of a torch_dist checkpoint: who lies where, before a single tensor is read.

One process writes the whole model; which ranks read it, and in which layout, doesn't matter to the format.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gspo_megatron.weights.rules import TensorSpec
from gspo_megatron.weights.torch_dist.keys import KeyTable, Place, megatron_shape
from gspo_megatron.weights.torch_dist.reader import COMMON, FORMAT, FORMAT_CONTENT
from gspo_megatron.weights.torch_dist.records import ALIGNMENT, record
from gspo_megatron.weights.torch_dist.unpickle import METADATA

CHUNK_BYTES = 256 * 2**20  # of a tensor, at most, in one entry: a reader needs that much memory for it


@dataclass(frozen=True)
class Parameter:
    """One parameter to be written."""

    spec: TensorSpec
    place: Place
    shape: tuple[int, ...]  # of the parameter itself, without the axes of its place
    dtype: torch.dtype


@dataclass(frozen=True)
class Entry:
    """A block of a parameter's rows in a file; all of it where it has no rows to cut."""

    parameter: Parameter
    first_row: int
    shape: tuple[int, ...]  # of the block
    start: int  # in the file
    nbytes: int

    @property
    def offsets(self) -> tuple[int, ...]:
        rest = (self.first_row, *(0 for _ in self.shape[1:])) if self.shape else ()
        return (*self.parameter.place.index, *rest)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*(1 for _ in self.parameter.place.index), *self.shape)


@dataclass(frozen=True)
class DistcpFile:
    """One *.distcp file."""

    name: str
    nbytes: int
    entries: tuple[Entry, ...]


def parameters_of(table: KeyTable, specs: Sequence[TensorSpec], dtype_of: dict[str, torch.dtype]) -> list[Parameter]:
    """What of the model is written: everything but second copies. `dtype_of`: by Megatron's name."""
    return [
        Parameter(spec, table.place(spec), megatron_shape(spec), dtype_of[spec.megatron])
        for spec in specs
        if not spec.load_only
    ]


def plan_files(parameters: Iterable[Parameter], *, file_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> list[DistcpFile]:
    """Cut parameters into entries, and group these into files of about `file_bytes`, in the given order.

    A parameter is in one file, however large: it is put together once.
    """
    files: list[DistcpFile] = []
    entries: list[Entry] = []
    position = 0

    def close() -> None:
        nonlocal entries, position
        if entries:
            files.append(DistcpFile(f"__{len(files)}_0.distcp", position, tuple(entries)))
        entries, position = [], 0

    for parameter in parameters:
        blocks = [(row, shape, _entry_bytes(parameter, shape)) for row, shape in _blocks(parameter, chunk_bytes)]
        if entries and position + sum(nbytes for _, _, nbytes in blocks) > file_bytes:
            close()
        for first_row, shape, nbytes in blocks:
            entries.append(Entry(parameter, first_row, shape, position, nbytes))
            position += nbytes
            assert position % ALIGNMENT == 0
    close()
    return files


def _entry_bytes(parameter: Parameter, shape: tuple[int, ...]) -> int:
    return record(parameter.dtype, (*(1 for _ in parameter.place.index), *shape)).nbytes


def _blocks(parameter: Parameter, chunk_bytes: int) -> Iterable[tuple[int, tuple[int, ...]]]:
    shape = parameter.shape
    nbytes = torch.Size(shape).numel() * parameter.dtype.itemsize
    if not shape or nbytes <= chunk_bytes:
        return [(0, shape)]
    rows = max(1, shape[0] * chunk_bytes // nbytes)
    return [(first, (min(rows, shape[0] - first), *shape[1:])) for first in range(0, shape[0], rows)]


def write_structure(
    folder: Path, files: Sequence[DistcpFile], table: KeyTable, common: dict[str, Any] | None = None
) -> None:
    """Write what makes a checkpoint of the files: .metadata, metadata.json, common.pt, and the empty states of
    Megatron's linear layers, all of which are the same few bytes of one further file."""
    empty = io.BytesIO()
    torch.save([None], empty)
    empty_name = f"__{len(files)}_0.distcp"
    (folder / empty_name).write_bytes(empty.getvalue())
    with open(folder / METADATA, "wb") as file:
        pickle.dump(_metadata(files, table, empty_name, len(empty.getvalue())), file)
    (folder / FORMAT).write_text(json.dumps(FORMAT_CONTENT))
    torch.save(common or {}, folder / COMMON)
    for name in (empty_name, METADATA, FORMAT, COMMON):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def _metadata(files: Sequence[DistcpFile], table: KeyTable, empty_name: str, empty_bytes: int) -> Metadata:
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for entry in file.entries:
            parameter, key = entry.parameter, entry.parameter.place.key
            if key not in state:
                size = torch.Size((*parameter.place.sizes, *parameter.shape))
                state[key] = TensorStorageMetadata(TensorProperties(parameter.dtype), size, [])
            assert state[key].properties.dtype == parameter.dtype, f"{key} holds tensors of two dtypes"
            state[key].chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))
            storage[MetadataIndex(key, entry.offsets)] = _StorageInfo(file.name, entry.start, entry.nbytes)
            for empty_state in table.empty_states(parameter.spec):
                state[empty_state] = BytesStorageMetadata()
                storage[MetadataIndex(empty_state)] = _StorageInfo(empty_name, 0, empty_bytes)
    return Metadata(state, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
