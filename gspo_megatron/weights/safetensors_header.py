"""The header of a safetensors file: checked in full before anything is believed, and written.

A file is 8 bytes with the header's length, the header, a JSON object that says where each tensor lies, and the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file."""

    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the data
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    tensors: dict[str, StoredTensor]  # in the order of their places
    metadata: dict[str, str]
    data_start: int  # bytes from the beginning of the file


class _Wrong(ValueError):
    """What is wrong with a header."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: ValueError where an object names a thing twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_header(path: Path) -> Header:
    """Of a file. Raises UserError, naming the file, unless every byte of the data belongs to exactly one tensor."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            if len(start) < 8:
                raise _Wrong(f"it has {size} bytes")
            [length] = struct.unpack("<Q", start)
            if length > min(_MOST_HEADER_BYTES, size - 8):
                raise _Wrong(f"its header would take {length} bytes of {size}")
            return _parse(file.read(length), size - 8 - length, 8 + length)
    except OSError as error:
        raise UserError(f"{path} is no readable safetensors file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from None


def _parse(text: bytes, data_bytes: int, data_start: int) -> Header:
    content = json.loads(text.decode(), object_pairs_hook=without_duplicates, parse_constant=_no_constant)
    if not isinstance(content, dict):
        raise _Wrong("its header is no JSON object")
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Wrong(f"its {_METADATA} is not text by name")
    for string in (*content, *metadata, *metadata.values()):
        string.encode()  # ValueError: halves of characters
    tensors = {name: _entry(name, entry) for name, entry in content.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    position = 0
    for name, tensor in tensors.items():
        if tensor.start != position:
            raise _Wrong(f"{name} begins at byte {tensor.start} of the data, the tensor before it ends at {position}")
        position += tensor.nbytes
    if position != data_bytes:
        raise _Wrong(f"its tensors take {position} bytes, its data are {data_bytes}")
    return Header(tensors, metadata, data_start)


def _no_constant(name: str) -> Any:
    raise _Wrong(f"it holds {name}")


def _entry(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Wrong(f"{name} has the dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _Wrong(f"{name} has the shape {shape!r} at {offsets!r}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _Wrong(f"{name} of {dtype} {shape} takes {nbytes} bytes, not those from {offsets[0]} to {offsets[1]}")
    return StoredTensor(dtype, tuple(shape), offsets[0], nbytes)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def format_header(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The bytes before the data of a file that holds the tensors one after the other, and the file's whole size.

    The same bytes as the safetensors package writes for the same order.
    """
    content: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + position
