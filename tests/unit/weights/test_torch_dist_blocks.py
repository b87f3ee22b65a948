"""Blocks in a checkpoint's files: their arithmetic, and what is said of files that are not what they should be."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.blocks import (
    Block,
    dump_entries,
    load_entries,
    read_blocks,
    rectangles,
    write_blocks,
    write_metadata,
)
from tests.checkpoint_files import read_tensors


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(0, 700), st.integers(0, 700))
def test_rectangles_are_the_elements_in_their_order(shape: list[int], a: int, b: int) -> None:
    size = math.prod(shape)
    start, stop = sorted((a % (size + 1), b % (size + 1)))
    numbers = torch.arange(size).reshape(shape)
    found = [
        numbers[tuple(slice(o, o + n) for o, n in zip(offset, block, strict=True))].flatten()
        for offset, block in rectangles(shape, start, stop)
    ]
    assert torch.cat([*found, torch.empty(0, dtype=torch.int64)]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def save(folder: Path, parts: list[list[Block]]) -> None:
    """A checkpoint of so many ranks."""
    folder.mkdir()
    entries = []
    for rank, own in enumerate(parts):
        entries += write_blocks(folder / f"__{rank}_0.distcp", own, [(f"note/{rank}", [None])])[0]
    assert load_entries(dump_entries(entries)) == entries
    write_metadata(folder, entries)


WHOLE = torch.arange(7.0 * 6).reshape(7, 6)


def blocks(tensor: torch.Tensor, cuts: list[tuple[slice, slice]], key: str = "w") -> list[Block]:
    return [Block(key, tuple(tensor.shape), (a.start, b.start), tensor[a, b]) for a, b in cuts]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cuts = [(slice(0, 3), slice(0, 6)), (slice(3, 7), slice(0, 2))], [(slice(3, 7), slice(2, 6))]
    save(tmp_path / "saved", [blocks(WHOLE, list(part)) for part in cuts])
    return tmp_path / "saved"


def test_any_blocks_are_read_from_any_others(saved: Path) -> None:
    assert torch.equal(read_tensors(saved)["w"], WHOLE)
    target = torch.full((7, 6), -1.0)
    read_blocks(saved, blocks(target, [(slice(0, 4), slice(1, 5)), (slice(4, 7), slice(0, 6))]))
    expected = WHOLE.clone()
    expected[0:4, 0] = expected[0:4, 5] = -1
    assert torch.equal(target, expected)


def test_padding_may_differ(saved: Path) -> None:
    more, fewer = torch.full((9, 6), 5.0), torch.full((5, 6), 5.0)
    read_blocks(saved, [Block("w", (9, 6), (0, 0), more, is_flexible=True)])
    read_blocks(saved, [Block("w", (5, 6), (0, 0), fewer, is_flexible=True)])
    assert torch.equal(more[:7], WHOLE) and not more[7:].any() and torch.equal(fewer, WHOLE[:5])
    with pytest.raises(UserError, match=r"w has the shape \[7, 6\], the model \[9, 6\]"):
        read_blocks(saved, [Block("w", (9, 6), (0, 0), more)])


def test_another_dtype_is_taken_over_only_on_request(tmp_path: Path) -> None:
    whole = [(slice(0, 7), slice(0, 6))]
    save(tmp_path / "saved", [blocks((WHOLE / 3).bfloat16(), whole)])
    target = torch.zeros(7, 6)
    with pytest.raises(UserError, match=r"w is torch.bfloat16, the model's is torch.float32"):
        read_blocks(tmp_path / "saved", blocks(target, whole))
    read_blocks(tmp_path / "saved", blocks(target, whole), converts=True)
    assert torch.equal(target, (WHOLE / 3).bfloat16().float())
    with pytest.raises(UserError, match=r"w is torch.bfloat16, the model's is torch.int64"):
        read_blocks(tmp_path / "saved", blocks(target.long(), whole), converts=True)


def test_a_tensor_with_a_hole_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="w: 18 elements were saved of 42"):
        save(tmp_path / "saved", [blocks(WHOLE, [(slice(0, 3), slice(0, 6))])])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['EVIL']}",)


def test_no_code_is_run_from_a_checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    target = [Block("w", (7, 6), (0, 0), torch.zeros(7, 6))]
    file = saved / "__1_0.distcp"
    good = file.read_bytes()
    torch.save(Evil(), file)
    file.write_bytes(file.read_bytes().ljust(len(good), b"\0"))
    with pytest.raises(UserError, match=r"__1_0\.distcp: w can't be read"):
        read_blocks(saved, target)
    file.write_bytes(good)
    (saved / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"\.metadata is no metadata .*system has no place in it"):
        read_blocks(saved, target)
    assert not (tmp_path / "evil").exists()


def test_files_are_named_that_are_cut_off_or_elsewhere(saved: Path, tmp_path: Path) -> None:
    target = [Block("w", (7, 6), (0, 0), torch.zeros(7, 6))]
    os.truncate(saved / "__1_0.distcp", 100)
    with pytest.raises(UserError, match=r"__1_0\.distcp: w can't be read"):
        read_blocks(saved, target)
    (saved / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"names '__1_0\.distcp', which is no file"):
        read_blocks(saved, target)
    outside = (saved / ".metadata").read_bytes().replace(b"__1_0.distcp", b"../../secret")
    (saved / ".metadata").write_bytes(outside)
    with pytest.raises(UserError, match=r"names '\.\./\.\./secret', which is no file"):
        read_blocks(saved, target)
