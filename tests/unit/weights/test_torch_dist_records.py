"""Entries of *.distcp files: torch reads what is written here, and what torch writes is read here."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch
from torch import Tensor

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.records import ALIGNMENT, DTYPES, decode, describing_pickle, record

SHAPES = [(3,), (1, 4, 5), (2, 0), (1,), (), (300, 70), (1, 70_000)]


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def encode(tensor: Tensor) -> bytes:
    return b"".join(record(tensor.dtype, tuple(tensor.shape)).encode(tensor))


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_loads_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = tensor_of(shape, dtype)
    data = encode(tensor)
    assert len(data) == record(dtype, shape).nbytes and len(data) % ALIGNMENT == 0
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded, tensor)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() in ("archive/data/0", None), "every CRC is right but that of the data, which is 0"
        assert archive.getinfo("archive/data/0").CRC == 0
    assert data.index(b"archive/data/0") < ALIGNMENT * 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pickle_is_torchs_own_byte_for_byte(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(tensor_of(shape, dtype)))) as archive:
        assert archive.read("archive/data.pkl") == describing_pickle(dtype, shape)


@pytest.mark.parametrize("write", [encode, saved])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0, 1])
def test_entries_are_read_bitwise_wherever_they_lie(write: object, dtype: torch.dtype, shift: int) -> None:
    assert callable(write)
    tensor = tensor_of((3, 5), dtype)
    data = write(tensor)
    memory = memoryview(bytearray(bytes(shift) + data))[shift:]
    found = decode(memory, dtype, (3, 5), "entry")
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_an_aligned_entry_is_read_without_a_copy() -> None:
    memory = bytearray(encode(torch.ones(4)))
    found = decode(memoryview(memory), torch.float32, (4,), "entry")
    memory[memory.index(b"\x00\x00\x80\x3f") + 3] = 0x40
    assert not torch.equal(found, torch.ones(4))


@pytest.mark.parametrize("value", [torch.ones(6, 4).T[:2], torch.ones(8, requires_grad=True)[:4].detach()])
def test_views_that_torch_saved_are_read_too(value: Tensor) -> None:
    found = decode(memoryview(bytearray(saved(value))), value.dtype, value.shape, "entry")
    assert torch.equal(found, value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3, 5), r"entry holds torch.float32 \[3, 5\], the checkpoint's metadata promise torch.float32 \[5,"),
        (torch.ones(5, 3).double(), "entry holds torch.float64"),
        ([torch.ones(5, 3)], "entry holds list"),
        (print, "entry can't be read as tensors and plain values"),
    ],
)
def test_something_else_than_promised_is_refused(value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(memoryview(bytearray(saved(value))), torch.float32, (5, 3), "entry")


def test_damaged_entries_are_refused_or_read_as_torch_reads_them() -> None:
    """Whatever byte is changed: UserError, or the tensor with at most its own data changed. Never another error."""
    tensor = tensor_of((3, 4), torch.float32)
    data = encode(tensor)
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        try:
            found = decode(memoryview(broken), torch.float32, (3, 4), "entry")
        except UserError:
            continue
        assert found.shape == (3, 4)
    for length in range(0, len(data), 7):
        with pytest.raises(UserError):
            decode(memoryview(bytearray(data[:length])), torch.float32, (3, 4), "entry")
