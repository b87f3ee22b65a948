"""A torch_dist folder, read tensor by tensor and without torch.distributed."""

from __future__ import annotations

import json
import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.records import decode
from gspo_megatron.weights.torch_dist.unpickle import METADATA, load_metadata, load_weights_only

FORMAT = "metadata.json"
COMMON = "common.pt"
FORMAT_CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint. Its chunks fill it and don't overlap."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TorchDistCheckpoint:
    """The tensors of one folder by Megatron's keys. Files are mapped, not read; safe to use from several threads.

    Everything that the metadata promise is checked on opening: files, places in them, and that chunks fill tensors.
    Raises UserError that names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._maps: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        _check_format(self.folder / FORMAT)
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: set[str] = set()  # keys of what is no tensor
        self._index: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        self._describe(load_metadata(self.folder))

    # --- what the metadata say -----------------------------------------------------------------------------------

    def _describe(self, metadata: Metadata) -> None:
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise self._wrong("it lists no tensors")
        sizes: dict[str, int] = {}
        for key, entry in entries.items():
            if not isinstance(key, str):
                raise self._wrong(f"a key is {key!r}")
            if isinstance(entry, BytesStorageMetadata):
                self._locate(MetadataIndex(key), storage, sizes)
                self.objects.add(key)
            elif isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = self._tensor(key, entry, storage, sizes)
            else:
                raise self._wrong(f"{key} is a {type(entry).__name__}")

    def _tensor(
        self, key: str, entry: TensorStorageMetadata, storage: dict[Any, Any], file_sizes: dict[str, int]
    ) -> StoredTensor:
        try:
            shape, dtype = _integers(entry.size), entry.properties.dtype
            boxes = [(_integers(chunk.offsets), _integers(chunk.sizes)) for chunk in entry.chunks]
        except (AttributeError, TypeError) as error:
            raise self._wrong(f"{key} is not described: {error}") from None
        if not isinstance(dtype, torch.dtype):
            raise self._wrong(f"{key} has the dtype {dtype!r}")
        chunks = []
        for offsets, sizes in boxes:
            inside = len(offsets) == len(sizes) == len(shape) and all(
                offset >= 0 and offset + size <= whole
                for offset, size, whole in zip(offsets, sizes, shape, strict=True)
            )
            if not inside:
                raise self._wrong(f"{key} {list(shape)} has a part at {list(offsets)} of {list(sizes)}")
            place = self._locate(MetadataIndex(key, offsets), storage, file_sizes)
            chunks.append(Chunk(offsets, sizes, *place))
        stored = StoredTensor(key, dtype, shape, tuple(chunks))
        self._check_filled(stored)
        return stored

    def _check_filled(self, stored: StoredTensor) -> None:
        """Chunks that lie inside, don't overlap and have as many numbers as the tensor, fill it."""
        filled, whole = sum(math.prod(chunk.sizes) for chunk in stored.chunks), math.prod(stored.shape)
        if filled != whole:
            raise self._wrong(f"the parts of {stored.key} {list(stored.shape)} hold {filled} numbers, not {whole}")
        for one, other in _neighbours(stored):
            if _overlap(one, other):
                raise self._wrong(f"the parts of {stored.key} at {list(one.offsets)} and {list(other.offsets)} overlap")

    def _locate(self, index: MetadataIndex, storage: dict[Any, Any], sizes: dict[str, int]) -> tuple[str, int, int]:
        """File, start and length of an entry."""
        info = storage.get(index)
        what = index.fqn if index.offset is None else f"{index.fqn} at {list(index.offset)}"
        if info is None:
            raise self._wrong(f"{what} is in no file")
        name: Any = getattr(info, "relative_path", None)
        start: Any = getattr(info, "offset", None)
        length: Any = getattr(info, "length", None)
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name.encode()) > 255:
            raise self._wrong(f"{what} is in {name!r}, which is not a file of {self.folder}")
        if getattr(info, "transform_descriptors", None):
            raise self._wrong(f"{what} is transformed by {info.transform_descriptors!r}, which is not known here")
        if name not in sizes:
            path = self.folder / name
            if path.is_symlink() or not path.is_file():
                raise UserError(
                    f"{path} is missing or no plain file; {self.folder / METADATA} says that it holds {what}"
                )
            sizes[name] = path.stat().st_size
        if not _is_count(start) or not _is_count(length) or start + length > sizes[name]:
            raise UserError(
                f"{self.folder / name} has {sizes[name]} bytes; {self.folder / METADATA} says that {what} takes "
                f"{length!r} from {start!r}: one of them is damaged"
            )
        return name, start, length

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.folder / METADATA} is damaged: {what}")

    # --- the tensors ---------------------------------------------------------------------------------------------

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """A tensor, or what lies behind a position along its first axes. May be a view of a file: don't write to it."""
        stored, index = self.tensors[key], tuple(index)
        shape = stored.shape[len(index) :]
        parts = self._chunks(stored, index)
        whole = (*(1 for _ in index), *shape)
        if len(parts) == 1 and parts[0].sizes == whole:
            return self._load(stored, parts[0]).view(shape)
        target = torch.empty(shape, dtype=stored.dtype)
        for chunk in parts:
            source = self._load(stored, chunk)
            for axis, position in enumerate(index):
                source = source.narrow(axis, position - chunk.offsets[axis], 1)
            source = source.reshape(source.shape[len(index) :])
            view = target
            for axis, (offset, size) in enumerate(zip(chunk.offsets[len(index) :], source.shape, strict=True)):
                view = view.narrow(axis, offset, size)
            view.copy_(source)
        return target

    def _chunks(self, stored: StoredTensor, index: tuple[int, ...]) -> list[Chunk]:
        """Those that hold a part of what lies behind the position."""
        depth = len(index)
        assert all(0 <= i < size for i, size in zip(index, stored.shape, strict=False)), (stored.key, index)
        with self._lock:
            if (key := f"{depth} {stored.key}") not in self._index:
                table: dict[tuple[int, ...], list[Chunk]] = {}
                for chunk in stored.chunks:
                    for position in _positions(chunk, depth):
                        table.setdefault(position, []).append(chunk)
                self._index[key] = table
            return self._index[key].get(index, [])

    def _load(self, stored: StoredTensor, chunk: Chunk) -> Tensor:
        entry = self._map(chunk.file)[chunk.start : chunk.start + chunk.nbytes]
        return decode(entry, stored.dtype, chunk.sizes, f"{self.folder / chunk.file} ({stored.key})")

    def _map(self, name: str) -> memoryview:
        with self._lock:
            if name not in self._maps:
                with open(self.folder / name, "rb") as file:
                    # A private mapping: torch wants memory that could be written to.
                    self._maps[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            return self._maps[name]

    def common(self) -> Any:
        """common.pt: what is saved once, tensors and plain values."""
        return load_weights_only(self.folder / COMMON, str(self.folder / COMMON))


def _neighbours(stored: StoredTensor) -> Iterator[tuple[Chunk, Chunk]]:
    """Pairs of chunks that share rows of the first axis: only these can overlap."""
    if not stored.shape:
        yield from combinations(stored.chunks, 2)
        return
    ordered = sorted(stored.chunks, key=lambda chunk: chunk.offsets[0])
    for i, one in enumerate(ordered):
        for other in islice(ordered, i + 1, None):
            if other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            yield one, other


def _overlap(one: Chunk, other: Chunk) -> bool:
    boxes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in boxes)


def _positions(chunk: Chunk, depth: int) -> list[tuple[int, ...]]:
    """Every position along the first `depth` axes that the chunk covers."""
    positions: list[tuple[int, ...]] = [()]
    for offset, size in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True):
        positions = [(*position, i) for position in positions for i in range(offset, offset + size)]
    return positions


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _integers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if not all(map(_is_count, found)):
        raise TypeError(f"{values!r} is no shape")
    return found


def _check_format(path: Path) -> None:
    """Megatron's metadata.json must name the one format that is read here."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is no checkpoint of Megatron's dist_checkpointing")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if content != FORMAT_CONTENT:
        raise UserError(f"{path} must hold {json.dumps(FORMAT_CONTENT)}; it holds {str(content)[:200]}")


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder looks like a checkpoint of this format."""
    return (folder / METADATA).exists() or (folder / FORMAT).exists()
