"""Blocks of global tensors in a checkpoint's files: written by the rank that has them, read by those that need them.

The format is torch.distributed.checkpoint's, as Megatron writes it: `.metadata` says of each tensor which blocks there
are and where they lie in the files of the ranks. Blocks may be of any shape, so that an optimizer's flat shards need
not be gathered before they are saved. torch's and Megatron's own readers read what is written here.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.checksums import FileSum
from gspo_megatron.weights.torch_dist.unpickle import METADATA, load_metadata, load_weights_only

Shape = tuple[int, ...]
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Block:
    """A block of a global tensor, and its values in this rank's memory."""

    key: str
    global_shape: Shape
    offset: Shape
    tensor: Tensor  # of the block's shape; a view of what is saved or loaded
    is_flexible: bool = False  # the saved tensor may have another shape: rows of padding more or less


@dataclass(frozen=True)
class Entry:
    """A block, or an object, in a file."""

    key: str
    file: str
    start: int  # bytes
    length: int  # bytes
    dtype: str = ""  # "float32"; "" for an object
    global_shape: Shape = ()
    offset: Shape = ()
    shape: Shape = ()


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, shape) of the blocks that make up elements start … stop - 1 of a row-major tensor, in their order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row, rest = math.prod(shape[1:]), tuple(shape[1:])
    first, skipped = divmod(start, row)
    last, left_over = divmod(stop, row)
    if first == last:
        parts = [(first, skipped, left_over)]
        whole = 0
    else:
        parts = [(first, skipped, row)] if skipped else []
        whole = last - first - bool(skipped)
    for index, a, b in parts:
        yield from (((index, *offset), (1, *block)) for offset, block in rectangles(rest, a, b))
    if first == last:
        return
    if whole:
        yield (first + bool(skipped), *(0 for _ in rest)), (whole, *rest)
    yield from (((last, *offset), (1, *block)) for offset, block in rectangles(rest, 0, left_over))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class _HashedFile(io.RawIOBase, IO[bytes]):  # type: ignore[misc]
    """Counts and hashes what goes by."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position, self.digest = file, 0, xxhash.xxh3_128()
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.position += size
        return size

    def save(self, value: Any) -> tuple[int, int]:
        """torch.save; returns start and length. Raises OSError, of which torch makes an error of its own, as it was."""
        start = self.position
        try:
            torch.save(value, self)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        return start, self.position - start


def write_blocks(
    path: Path, blocks: Iterable[Block], objects: Iterable[tuple[str, Any]]
) -> tuple[list[Entry], FileSum]:
    """Write this rank's file, and fsync it."""
    entries = []
    with open(path, "wb") as file:
        stream = _HashedFile(file)
        for block in blocks:
            place = stream.save(_alone(block.tensor))
            dtype = str(block.tensor.dtype).removeprefix("torch.")
            shape = tuple(block.tensor.shape)
            entries.append(Entry(block.key, path.name, *place, dtype, block.global_shape, block.offset, shape))
        for key, value in objects:
            entries.append(Entry(key, path.name, *stream.save(value)))
        file.flush()
        os.fsync(file.fileno())
    return entries, FileSum(stream.position, stream.digest.hexdigest())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor with a storage of just its size, all of which torch.save writes."""
    tensor = tensor.detach()
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)


def dump_entries(entries: Sequence[Entry]) -> str:
    """As JSON, to tell them to the rank that writes `.metadata`."""
    return json.dumps([list(asdict(entry).values()) for entry in entries])


def load_entries(text: str) -> list[Entry]:
    """Inverse of `dump_entries`."""
    return [Entry(*values[:5], *map(tuple, values[5:])) for values in json.loads(text)]


def write_metadata(folder: Path, entries: Sequence[Entry]) -> None:
    """Write and fsync `.metadata` over all ranks' entries. Asserts that they make up every tensor completely."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, blocks in by_key.items():
        first = blocks[0]
        if not first.dtype:
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(first.file, first.start, first.length)
            continue
        saved, whole = sum(math.prod(b.shape) for b in blocks), math.prod(first.global_shape)
        assert saved == whole, f"{key}: {saved} elements were saved of {whole}"
        assert len({b.offset for b in blocks}) == len(blocks), f"{key}: a block was saved twice"
        assert {(b.dtype, b.global_shape) for b in blocks} == {(first.dtype, first.global_shape)}, key
        described[key] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, first.dtype)),
            torch.Size(first.global_shape),
            [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in blocks],
        )
        for i, b in enumerate(blocks):
            places[MetadataIndex(key, b.offset, i)] = _StorageInfo(b.file, b.start, b.length)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(described, storage_data=places), file)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_blocks(folder: Path, blocks: Sequence[Block], *, converts: bool = False) -> None:
    """Fill the blocks' tensors from a checkpoint's files, whatever blocks they were saved in.

    `converts`: where the stored dtype is another than the tensor's, take over the numbers.

    Raises:
        UserError: the checkpoint lacks a tensor, or a part of one, or has it in another shape or dtype.
    """
    metadata = load_metadata(folder)
    wanted: dict[str, list[Block]] = defaultdict(list)
    for target in blocks:
        wanted[target.key].append(target)
    reads: list[tuple[_StorageInfo, str, Shape, Shape, list[Block]]] = []
    known = {key: metadata.state_dict_metadata[key] for key in wanted if key in metadata.state_dict_metadata}
    described = {key: _check(folder, key, found, wanted[key][0], converts) for key, found in known.items()}
    if missing := sorted(wanted.keys() - known.keys()):
        shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        raise UserError(f"{folder} lacks {len(missing)} tensors: {shown}")
    for key, targets in wanted.items():
        for saved, near in _neighbours(described[key].chunks, targets):
            place = (metadata.storage_data or {}).get(MetadataIndex(key, saved.offsets))
            if place is None:
                raise UserError(f"{folder / METADATA} does not say where a block of {key} lies")
            reads.append((place, key, tuple(saved.offsets), tuple(saved.sizes), near))
    filled: dict[int, int] = defaultdict(int)
    for target in blocks:
        if target.is_flexible:
            target.tensor.zero_()
    for (place, key, offset, shape, near), file in _in_order(folder, reads):
        file.seek(place.offset)
        saved = load_weights_only(io.BytesIO(file.read(place.length)), f"{folder / place.relative_path}: {key}")
        if (
            not isinstance(saved, Tensor)
            or tuple(saved.shape) != shape
            or saved.dtype != described[key].properties.dtype
        ):
            raise UserError(f"{folder / place.relative_path}: {key} is not the tensor that {METADATA} describes")
        for target in near:
            filled[id(target)] += _copy_overlap(saved, offset, target)
    for target in blocks:
        size = described[target.key].size
        there = (max(0, min(o + n, s) - o) for o, n, s in zip(target.offset, target.tensor.shape, size, strict=True))
        expected = math.prod(there)
        if filled[id(target)] != expected:
            raise UserError(
                f"{folder}: {target.key} has {filled[id(target)]} of {expected} elements at {target.offset}"
            )


def _check(folder: Path, key: str, described: Any, target: Block, converts: bool) -> TensorStorageMetadata:
    if not isinstance(described, TensorStorageMetadata):
        raise UserError(f"{folder}: {key} is no tensor")
    size, dtype = tuple(described.size), described.properties.dtype
    fits = size == target.global_shape if not target.is_flexible else size[1:] == target.global_shape[1:]
    if not fits:
        raise UserError(f"{folder}: {key} has the shape {list(size)}, the model {list(target.global_shape)}")
    if dtype != target.tensor.dtype and not (converts and dtype in _FLOATS and target.tensor.dtype in _FLOATS):
        raise UserError(f"{folder}: {key} is {dtype}, the model's is {target.tensor.dtype}; set model.dtype alike")
    return described


def _neighbours(
    stored: Sequence[ChunkStorageMetadata], targets: Sequence[Block]
) -> Iterator[tuple[ChunkStorageMetadata, list[Block]]]:
    """Saved blocks that some target overlaps, with those targets.

    Leading axes along which all are of size 1, layers and experts, are looked up; the rest is compared.
    """
    shapes = [tuple(b.sizes) for b in stored] + [tuple(t.tensor.shape) for t in targets]
    depth = next((i for i in range(len(shapes[0])) if any(s[i] != 1 for s in shapes)), len(shapes[0]))
    by_place: dict[Shape, list[Block]] = defaultdict(list)
    for target in targets:
        by_place[target.offset[:depth]].append(target)
    for saved in stored:
        near = [
            t
            for t in by_place.get(tuple(saved.offsets)[:depth], [])
            if _overlap(tuple(saved.offsets), tuple(saved.sizes), t) is not None
        ]
        if near:
            yield saved, near


def _overlap(offset: Shape, shape: Shape, target: Block) -> list[tuple[int, int]] | None:
    """[start, stop) of what both hold along each axis of the global tensor; None if nothing."""
    spans = [
        (max(a, b), min(a + n, b + m))
        for a, n, b, m in zip(offset, shape, target.offset, target.tensor.shape, strict=True)
    ]
    return spans if all(start < stop for start, stop in spans) else None


@torch.no_grad()
def _copy_overlap(saved: Tensor, offset: Shape, target: Block) -> int:
    """Returns the number of elements."""
    spans = _overlap(offset, tuple(saved.shape), target)
    assert spans is not None
    source = saved[tuple(slice(a - o, b - o) for (a, b), o in zip(spans, offset, strict=True))]
    into = target.tensor[tuple(slice(a - o, b - o) for (a, b), o in zip(spans, target.offset, strict=True))]
    into.copy_(source)
    return source.numel()


def _in_order(folder: Path, reads: list[Any]) -> Iterator[tuple[Any, IO[bytes]]]:
    """The reads as the files hold them, each with its open file."""
    by_file: dict[str, list[Any]] = defaultdict(list)
    for read in reads:
        by_file[read[0].relative_path].append(read)
    for name, own in sorted(by_file.items()):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{folder / METADATA} names {name!r}, which is no file of {folder}")
        with open(path, "rb") as file:
            for read in sorted(own, key=lambda r: r[0].offset):
                yield read, file
