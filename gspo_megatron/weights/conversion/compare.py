"""Comparing two models of any formats: by a hash per tensor, or by the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from gspo_megatron.weights.conversion.models import EMBEDDING, HEAD, Model, TorchDistModel
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, find_damage
from gspo_megatron.weights.torch_dist.records import raw_bytes

# What a conversion may change in config.json.
_ABOUT_STORAGE = ("dtype", "torch_dtype", "quantization_config")
_EQUAL = "equal in value"
_BLOCK_NUMBERS = 2**22  # compared at a time: memory stays small


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two models."""

    name: str
    reason: str  # "missing in …", "shape …", "values …"

    @property
    def is_of_dtype_alone(self) -> bool:
        """Whether the numbers are equal."""
        return self.reason.endswith(_EQUAL)


@dataclass(frozen=True)
class Comparison:
    """Of two models."""

    differences: tuple[TensorDifference, ...]
    config_differences: tuple[str, ...]
    left_out: tuple[str, ...]  # tensors that belong to no rule and were not compared
    tensors: int  # compared
    nbytes: int  # of these, in the first model

    @property
    def is_equal(self) -> bool:
        return not self.differences and not self.config_differences


def hash_tensor(tensor: Tensor) -> str:
    """xxh3-128 of dtype, shape and bytes."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(raw_bytes(tensor.contiguous()))
    return digest.hexdigest()


def check_files(model: Model, threads: int) -> list[str]:
    """Files of a torch_dist folder that don't have their checksums, as lines; [] for a folder without checksums."""
    if isinstance(model, TorchDistModel) and (model.folder / CHECKSUMS).is_file():
        return find_damage(model.folder, threads=threads)
    return []


def verify(
    one: Model,
    other: Model,
    *,
    dtype: torch.dtype | None = None,
    threads: int = 2,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Whether both hold the same tensors bit for bit: a hash of each tensor under its Hugging Face name, on both sides
    through the rules; and the same config.

    `dtype`: whether the other holds what a conversion of the one to this dtype gives.
    """

    def convert(name: str, tensor: Tensor) -> Tensor:
        origin = one.architecture.origins.get(name)
        return tensor if dtype is None else tensor.to((origin[0].dtype if origin else None) or dtype)

    return _compare(one, other, _by_hash, convert, threads=threads, advance=advance)


def diff(one: Model, other: Model, *, threads: int = 2, advance: Callable[[int], None] | None = None) -> Comparison:
    """How their tensors differ in numbers, whatever their dtypes; of two training checkpoints the optimizer's state
    too. Configs are compared too."""
    found = _compare(one, other, _by_value, threads=threads, advance=advance)
    if isinstance(one, TorchDistModel) and isinstance(other, TorchDistModel) and one.others and other.others:
        more = _compare_sets(
            _Side(one.folder, one.others, one.checkpoint.read),
            _Side(other.folder, other.others, other.checkpoint.read),
            _by_value,
            threads=threads,
            advance=advance,
        )
        found = replace(found, differences=(*found.differences, *more), tensors=found.tensors + len(one.others))
    return found


@dataclass(frozen=True)
class _Side:
    """Named tensors of a folder."""

    folder: Path
    names: Sequence[str]
    read: Callable[[str], Tensor]
    convert: Callable[[str, Tensor], Tensor] | None = None  # before it is compared


def _compare(
    one: Model,
    other: Model,
    compare: Callable[[Tensor, Tensor], str | None],
    convert: Callable[[str, Tensor], Tensor] | None = None,
    *,
    threads: int,
    advance: Callable[[int], None] | None,
) -> Comparison:
    # A tied head may be stored or not. The side that lacks it has its embedding for one.
    tied = all(model.config.get("tie_word_embeddings") for model in (one, other))
    may_lack = {HEAD} if tied and not (HEAD in one.names and HEAD in other.names) else set()
    heads = [model for model in (one, other) if may_lack & set(model.names)]
    untied = [TensorDifference(HEAD, reason) for model in heads if (reason := _compare_head(model, compare))]
    left, right = (_Side(m.folder, [n for n in m.names if n not in may_lack], m.read) for m in (one, other))
    left = replace(left, convert=convert)
    differences = _compare_sets(left, right, compare, threads=threads, advance=advance)
    common = set(left.names) & set(right.names)
    return Comparison(
        (*untied, *differences),
        tuple(config_differences(one.config, other.config)),
        tuple(sorted({*one.left_out, *other.left_out})),
        len(common),
        sum(nbytes_of(one, name) for name in common),
    )


def _compare_head(model: Model, compare: Callable[[Tensor, Tensor], str | None]) -> str | None:
    """Of a tied head and the embedding of one model."""
    head, embedding = model.read(HEAD), model.read(EMBEDDING)
    same_shape = head.shape == embedding.shape
    reason = compare(head, embedding) if same_shape else f"shape {list(head.shape)}, {list(embedding.shape)}"
    return None if reason is None else f"in {model.folder} it is not {EMBEDDING}, to which it is tied: {reason}"


def _compare_sets(
    one: _Side,
    other: _Side,
    compare: Callable[[Tensor, Tensor], str | None],
    *,
    threads: int,
    advance: Callable[[int], None] | None,
) -> list[TensorDifference]:
    ours, theirs = set(one.names), set(other.names)
    missing = [
        TensorDifference(name, f"missing in {side.folder}")
        for side, names in ((other, ours - theirs), (one, theirs - ours))
        for name in sorted(names)
    ]

    def check(name: str) -> TensorDifference | None:
        left, right = one.read(name), other.read(name)
        nbytes = left.numel() * left.element_size()
        left = left if one.convert is None else one.convert(name, left)
        same_shape = left.shape == right.shape
        reason = compare(left, right) if same_shape else f"shape {list(left.shape)}, {list(right.shape)}"
        if advance is not None:
            advance(nbytes)
        return None if reason is None else TensorDifference(name, reason)

    with ThreadPoolExecutor(threads) as pool:
        return missing + list(filter(None, pool.map(check, (name for name in one.names if name in theirs))))


def nbytes_of(model: Model, name: str) -> int:
    """Of a tensor."""
    return torch.Size(model.shape(name)).numel() * model.dtype(name).itemsize


def _by_hash(one: Tensor, other: Tensor) -> str | None:
    left, right = hash_tensor(one), hash_tensor(other)
    if left == right:
        return None
    return f"hash {left}, {right}; {_by_value(one, other) or _EQUAL}"


def _by_value(one: Tensor, other: Tensor) -> str | None:
    """The largest difference, where it is, and how many numbers differ. Numbers of one dtype are equal if their bits
    are."""
    same = one.dtype == other.dtype
    dtypes = "" if same else f"dtype {one.dtype}, {other.dtype}; "
    count, worst, place = 0, -1.0, 0
    left, right = one.reshape(-1), other.reshape(-1)
    for start in range(0, left.numel(), _BLOCK_NUMBERS):
        a, b = left[start : start + _BLOCK_NUMBERS], right[start : start + _BLOCK_NUMBERS]
        differs = _bits_differ(a, b) if same else ~((a.double() == b.double()) | (a.isnan() & b.isnan()))
        if not differs.any():
            continue
        count += int(differs.sum())
        gaps = torch.where(differs, (a.double() - b.double()).abs().nan_to_num(nan=torch.inf), -1.0)
        largest = int(gaps.argmax())
        if float(gaps[largest]) > worst:
            worst, place = float(gaps[largest]), start + largest
    if not count:
        return f"{dtypes}{_EQUAL}" if dtypes else None
    where = [int(i) for i in torch.unravel_index(torch.tensor(place), one.shape)] if one.dim() else []
    return f"{dtypes}{count} of {one.numel()} numbers differ, by at most {worst:.6g} at {where}"


def _bits_differ(one: Tensor, other: Tensor) -> Tensor:
    """[n] bool of two [n] of one dtype."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.view(integers) != other.view(integers)


def config_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of two config.json with different values, but for those that speak of the storage."""
    keys = sorted((one.keys() | other.keys()) - set(_ABOUT_STORAGE))
    return [
        f"{key}: {one.get(key, '(absent)')!r}, {other.get(key, '(absent)')!r}"
        for key in keys
        if one.get(key, ...) != other.get(key, ...)
    ]
