"""SGLang's checksums of a server's parameters, computed here piece by piece.

`/weights_checker` with action "checksum" hashes each parameter on each rank: on a CPU by the first 8 bytes of SHA-256,
on a GPU by a sum of hashes of tiles (sglang 0.5.23: srt/utils/weight_checker.py, srt/managers/mm_utils.py,
kernels/ops/memory/gpu_tensor_hash.py).
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_SEED = 0x243F6A88
_SEEDS = (_SEED, (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK)
_POSITION = (0x27D4EB2D, 0x165667B1)
_ROTATION = (15, 13)
_TILE = 8192  # 32-bit words
_CHUNK_BYTES = 128 * 4 * _TILE  # hashed at a time: the integers that it becomes take 17 times as much memory


class Checksum(Protocol):
    """Of one parameter on one server rank; `update` takes its contiguous pieces in order."""

    def update(self, piece: Tensor) -> None: ...

    def hexdigest(self) -> str: ...


class HostChecksum:
    """Of a parameter in host memory."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, piece: Tensor) -> None:
        self._hash.update(piece.reshape(-1).view(torch.uint8).cpu().numpy().data)

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        return self._hash.digest()[:8].hex()


class DeviceChecksum:
    """Of a parameter in a GPU's memory. Words of 32 bits are hashed with their position, summed over tiles of 8192
    words, and the tiles' hashes are summed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._position = 0  # in words, of the next tile
        self._sums = torch.zeros(2, dtype=torch.int64)  # of the tiles' hashes: their high halves, their low halves

    def update(self, piece: Tensor) -> None:
        # By rows first: making a part of a matrix contiguous copies it.
        row_bytes = piece[:1].numel() * piece.element_size()
        for rows in piece.split(max(1, _CHUNK_BYTES // max(1, row_bytes))):
            for data in rows.reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
                data = torch.cat([self._rest.to(data.device), data])
                whole = data.numel() // (4 * _TILE) * (4 * _TILE)
                if whole:
                    self._add(data[:whole])
                self._rest = data[whole:].clone()

    def _add(self, data: Tensor) -> None:
        """Whole tiles, or the last one."""
        # uint32 has no arithmetic in torch: words live in int64 and are masked after each step.
        words = data.view(torch.int32).to(torch.int64) & _MASK
        index = torch.arange(self._position, self._position + words.numel(), device=words.device) & _MASK
        self._position += words.numel()
        sums = []
        for multiplier, seed, rotation in zip(_POSITION, _SEEDS, _ROTATION, strict=True):
            rotated = ((index << rotation) | (index >> (32 - rotation))) & _MASK
            hashed = _mix(words ^ (_multiply(index, multiplier) + seed & _MASK) ^ rotated)
            tiles = torch.nn.functional.pad(hashed, (0, -hashed.numel() % _TILE)).view(-1, _TILE).sum(1) & _MASK
            sums.append(_mix(tiles ^ (self.nbytes + 3 & ~3 & _MASK)).sum())
        self._sums = self._sums.to(words.device) + torch.stack(sums)

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        if self._rest.numel():
            self._add(torch.nn.functional.pad(self._rest, (0, -self._rest.numel() % 4)))
            self._rest = self._rest[:0]
        high, low = self._sums.tolist()
        x = (high << 32) + low & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 30
        x = x * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 27
        x = x * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return f"{x ^ x >> 31:016x}"


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x · factor mod 2³², without leaving int64: the high half of x is multiplied by the low 16 bits of the result."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & _MASK


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer."""
    x = x ^ x >> 16
    x = _multiply(x, 0x85EBCA6B)
    x = x ^ x >> 13
    x = _multiply(x, 0xC2B2AE35)
    return x ^ x >> 16
