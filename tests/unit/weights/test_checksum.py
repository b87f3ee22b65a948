"""SGLang's checksums, against definitions written another way."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gspo_megatron.weights.checksum import Checksum, DeviceChecksum, HostChecksum


def tile_hash(data: bytes) -> str:
    """The definition of SGLang's GPU hash, word by word in numpy's wrapping arithmetic."""
    nbytes = len(data)
    words = np.frombuffer(data + b"\0" * (-nbytes % 4), dtype=np.uint32)

    def mix(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x85EBCA6B)
        x = x ^ (x >> np.uint32(13))
        x = x * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    seed = 0x243F6A88
    constants = [(0x27D4EB2D, seed, 15), (0x165667B1, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF, 13)]
    total = 0
    for start in range(0, len(words), 8192):
        tile = words[start : start + 8192]
        index = np.arange(start, start + len(tile), dtype=np.uint32)
        halves = []
        for factor, shift, rotation in constants:
            place = index * np.uint32(factor) + np.uint32(shift)
            place ^= (index << np.uint32(rotation)) | (index >> np.uint32(32 - rotation))
            tile_sum = mix(tile ^ place).sum(dtype=np.uint32) ^ np.uint32(4 * len(words))
            halves.append(int(mix(np.array([tile_sum], dtype=np.uint32))[0]))
        total = (total + (halves[0] << 32) + halves[1]) % 2**64
    x = total
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return f"{x ^ x >> 31:016x}"


def of_pieces(checksum: Checksum, tensor: torch.Tensor, size: int) -> str:
    for piece in tensor.split(size):
        checksum.update(piece)
    return checksum.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 7, 8192, 20_001])
@pytest.mark.parametrize("piece", [1, 3000, 10**6])
def test_checksums_are_those_of_the_whole_whatever_the_pieces(numel: int, piece: int, dtype: torch.dtype) -> None:
    if numel // piece > 100:
        piece = 100
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert of_pieces(HostChecksum(), tensor, piece) == hashlib.sha256(data).hexdigest()[:16]
    assert of_pieces(DeviceChecksum(len(data)), tensor, piece) == tile_hash(data)


def test_a_checksum_of_the_device_knows_a_swap_and_a_flipped_bit() -> None:
    tensor = torch.arange(10_000, dtype=torch.float32)
    first = of_pieces(DeviceChecksum(40_000), tensor, 10_000)
    swapped = tensor.clone()
    swapped[[3, 9000]] = tensor[[9000, 3]]
    flipped = tensor.clone()
    flipped.view(torch.int32)[77] ^= 1
    assert (
        len({first, of_pieces(DeviceChecksum(40_000), swapped, 10**5), of_pieces(DeviceChecksum(40_000), flipped, 9)})
        == 3
    )


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made inside it took at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        foreign = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        foreign -= self._living().keys()
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self._made += [weakref.ref(t) for t in made if t.untyped_storage().data_ptr() not in foreign]
        self.nbytes = max(self.nbytes, sum(self._living().values()))
        return result

    def _living(self) -> dict[int, int]:
        self._made = [r for r in self._made if r() is not None]
        storages = [t.untyped_storage() for r in self._made if (t := r()) is not None]
        return {s.data_ptr(): s.nbytes() for s in storages}


@pytest.mark.parametrize("columns", [2048, 1500], ids=["whole", "part of each row"])
def test_a_checksum_of_the_device_takes_memory_that_does_not_grow_with_the_piece(columns: int) -> None:
    peaks = []
    for megabytes in (8, 32):
        rows = megabytes * 2**20 // 4 // 2048
        piece = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(0))[:, :columns]
        checksum = DeviceChecksum(piece.numel() * 4)
        with PeakMemory() as memory:
            checksum.update(piece)
        peaks.append(memory.nbytes)
        assert checksum.hexdigest() == tile_hash(piece.numpy().tobytes())
    assert peaks[0] > 8 * 2**20  # they are seen at all
    assert peaks[1] < 1.01 * peaks[0] < 100 * 2**20
