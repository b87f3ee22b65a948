"""One tensor as `torch.save` writes it: the bytes at an entry's place in a *.distcp file.

torch's FileSystemReader gives each entry to `torch.load`. The entry is a zip archive of a small pickle, which names
dtype and shape, and of the tensor's bytes. Written here without a copy of the tensor, and so that its size is known
before; read here without a copy where it lies in a mapped file.

The archive's CRC of the tensor's bytes stays 0, as after torch.serialization.set_crc32_options(False): it would take
longer than all else, torch never looks at it, and checksums.json has better ones.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.unpickle import load_weights_only

ALIGNMENT = 64  # bytes, of the tensor's data in the entry and of the entries in a file
MOST_BYTES = 2**32 - 2**20  # of a tensor's data: what a zip archive without extensions can hold

_LOCAL, _CENTRAL, _END = struct.Struct("<IHHHHHIIIHH"), struct.Struct("<IHHHHHHIIIHHHHHII"), struct.Struct("<IHHHHIIH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
_PADDING_ID = 0x4246  # torch's own name for extra bytes that are there for alignment
_DATA = "archive/data/0"

_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
}  # fmt: skip
DTYPES = tuple(_STORAGES)  # that can be written


# --- the archive -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    name: bytes
    size: int
    offset: int  # of its local header
    extra: bytes  # of its local header

    @property
    def data_offset(self) -> int:
        return self.offset + _LOCAL.size + len(self.name) + len(self.extra)

    def local(self, crc: int) -> bytes:
        fields = (_LOCAL_MAGIC, 20, 0, 0, 0, 0, crc, self.size, self.size, len(self.name), len(self.extra))
        return _LOCAL.pack(*fields) + self.name + self.extra

    def central(self, crc: int) -> bytes:
        fields = (_CENTRAL_MAGIC, 20, 20, 0, 0, 0, 0, crc, self.size, self.size, len(self.name), 0, 0, 0, 0, 0)
        return _CENTRAL.pack(*fields, self.offset) + self.name


def _padding(position: int) -> bytes:
    """An extra field after which `position` is aligned; at least its own header long."""
    length = -(position + 4) % ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, length) + bytes(length)


@dataclass(frozen=True)
class Record:
    """How a tensor of one dtype and shape is laid out."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    head: tuple[tuple[_Member, bytes], ...]  # before the data
    data: _Member
    tail: tuple[tuple[_Member, bytes], ...]  # behind the data

    @property
    def nbytes(self) -> int:
        """Of the whole entry; a multiple of ALIGNMENT."""
        last, content = self.tail[-1]
        members = [m for m, _ in (*self.head, *self.tail)] + [self.data]
        central = sum(_CENTRAL.size + len(m.name) for m in members)
        return last.data_offset + len(content) + central + _END.size

    def encode(self, tensor: Tensor) -> list[memoryview | bytes]:
        """The entry's bytes, in pieces of which one is the tensor's own memory. The tensor must be contiguous."""
        assert tensor.dtype == self.dtype and tuple(tensor.shape) == self.shape and tensor.is_contiguous()
        head = [part for m, content in self.head for part in (m.local(zlib.crc32(content)), content)]
        tail = [part for m, content in self.tail for part in (m.local(zlib.crc32(content)), content)]
        central = [m.central(zlib.crc32(content)) for m, content in self.head]
        central.append(self.data.central(0))
        central += [m.central(zlib.crc32(content)) for m, content in self.tail]
        last, content = self.tail[-1]
        size, count, start = sum(map(len, central)), len(central), last.data_offset + len(content)
        tail += [*central, _END.pack(_END_MAGIC, 0, 0, count, count, size, start, 0)]
        return [b"".join(head) + self.data.local(0), raw_bytes(tensor), b"".join(tail)]


@lru_cache(maxsize=1024)
def record(dtype: torch.dtype, shape: tuple[int, ...]) -> Record:
    """The layout of an entry. Pure: no tensor is needed to know its size."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    assert nbytes <= MOST_BYTES, f"{shape} of {dtype} is more than an entry can hold"
    content, name = describing_pickle(dtype, shape), b"archive/data.pkl"
    description = _Member(name, len(content), 0, b"")
    offset = description.data_offset + len(content)
    data_name = _DATA.encode()
    data = _Member(data_name, nbytes, offset, _padding(offset + _LOCAL.size + len(data_name)))
    tail: list[tuple[_Member, bytes]] = []
    offset = data.data_offset + nbytes
    for name, content in ((b"archive/byteorder", b"little"), (b"archive/version", b"3\n")):
        member = _Member(name, len(content), offset, b"")
        tail.append((member, content))
        offset = member.data_offset + len(content)
    made = Record(dtype, shape, ((description, describing_pickle(dtype, shape)),), data, tuple(tail))
    # The last member's extra field makes the whole entry a multiple of the alignment.
    last, content = tail[-1]
    tail[-1] = (_Member(last.name, last.size, last.offset, _padding(made.nbytes)), content)
    return Record(dtype, shape, made.head, data, tuple(tail))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


# --- the pickle --------------------------------------------------------------------------------------------------


class _Storage:
    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.identity = ("storage", _STORAGES[dtype], "0", "cpu", count)


class _Described:
    """Pickles as a contiguous tensor that needs no gradient."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = _Storage(dtype, torch.Size(shape).numel()), shape

    def __reduce__(self) -> Any:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(reversed(strides)), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.identity if isinstance(item, _Storage) else None


@lru_cache(maxsize=1024)
def describing_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What `torch.save` writes as data.pkl for such a tensor, byte for byte."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Described(dtype, shape))
    return stream.getvalue()


# --- reading -----------------------------------------------------------------------------------------------------


def decode(entry: memoryview, dtype: torch.dtype, shape: Sequence[int], name: str) -> Tensor:
    """The tensor of an entry, which must have the dtype and shape that the checkpoint's metadata promise.

    A view of the entry's memory where that is aligned: it must not be written to. `name` says in messages which entry.
    Raises UserError.
    """
    shape = tuple(shape)
    place = _find_data(entry, dtype, shape)
    if place is None:  # not as it is usually written: torch reads more
        tensor = load_weights_only(io.BytesIO(entry), name)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{name} holds {found}, the checkpoint's metadata promise {dtype} {list(shape)}")
        return tensor.contiguous()
    data = entry[place : place + torch.Size(shape).numel() * dtype.itemsize]
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    whole = torch.frombuffer(data, dtype=torch.uint8)
    if whole.data_ptr() % dtype.itemsize:
        whole = whole.clone()
    return whole.view(dtype).view(shape)


def _find_data(entry: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """Where the data begin in an archive that is as torch and we write it, for a tensor of that dtype and shape."""
    if len(entry) < _END.size or dtype not in _STORAGES:
        return None
    magic, *_, count, directory_bytes, start, comment = _END.unpack_from(entry, len(entry) - _END.size)
    if magic != _END_MAGIC or comment or count > 16 or start + directory_bytes > len(entry):
        return None
    places: dict[bytes, tuple[int, int]] = {}
    position = start
    for _ in range(count):
        if position + _CENTRAL.size > len(entry):
            return None
        fields = _CENTRAL.unpack_from(entry, position)
        magic, method, size, stored, name_bytes, offset = (*(fields[i] for i in (0, 4, 8, 9, 10)), fields[16])
        name = bytes(entry[position + _CENTRAL.size : position + _CENTRAL.size + name_bytes])
        position += _CENTRAL.size + name_bytes + fields[11] + fields[12]
        if magic != _CENTRAL_MAGIC or method != 0 or size != stored or offset + _LOCAL.size > len(entry):
            return None
        local = _LOCAL.unpack_from(entry, offset)
        begin = offset + _LOCAL.size + local[9] + local[10]
        key = name.partition(b"/")[2]
        if local[0] != _LOCAL_MAGIC or begin + size > len(entry) or key in places:
            return None
        places[key] = begin, size
    description, data, order = (places.get(key) for key in (b"data.pkl", b"data/0", b"byteorder"))
    if description is None or data is None or order is None or entry[order[0] : sum(order)] != b"little":
        return None
    if entry[description[0] : sum(description)] != describing_pickle(dtype, shape):
        return None
    return data[0] if data[1] == torch.Size(shape).numel() * dtype.itemsize else None
