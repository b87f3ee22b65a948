"""The policy's state as blocks of global tensors: taken for a checkpoint, and put back from one.

Which block of which tensor a parameter is, Megatron's own `sharded_state_dict` says; keys are Megatron's too, so that
Megatron's loader reads the weights. The optimizer's state is kept under `optimizer.state.NAME.KEY`, each rank saving
just the flat parts it updates: nothing is gathered, and any layout reads what any other has saved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch import Tensor

from gspo_megatron.background import SharedMemory
from gspo_megatron.policy.optimizer_state import OptimizerShard, optimizer_shards, set_steps_done, steps_done
from gspo_megatron.weights.torch_dist.blocks import Block, rectangles

OPTIMIZER_KEY = "optimizer.state"
_METADATA = {"singleton_local_shards": False}  # one tensor for all layers, and for all experts of a layer


@dataclass(frozen=True)
class _Piece:
    """A block of a global tensor that is a contiguous part of a parameter, or of another saved tensor."""

    sharded: ShardedTensor
    owner: int  # id of the parameter
    start: int  # in the flattened parameter

    @property
    def tensor(self) -> Tensor:
        return self.sharded.data.detach()

    @property
    def replica(self) -> tuple[int, ...]:
        """(…, data-parallel rank); zeros: the one copy that is saved."""
        replica = self.sharded.replica_id
        return (replica,) if isinstance(replica, int) else tuple(replica)

    def block(self, key: str, values: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Block:
        """A block inside this one, with its values."""
        sharded = self.sharded
        axes = sharded.prepend_axis_num
        place = [o + i for o, i in zip(sharded.global_offset[axes:], offset, strict=True)]
        return Block(
            key,
            tuple(sharded.global_shape),
            (*sharded.global_offset[:axes], *place),
            values.view((1,) * axes + tuple(shape)),
            is_flexible=sharded.allow_shape_mismatch,
        )


@dataclass(frozen=True)
class Snapshot:
    """What this rank saves. Its tensors are views of the state, unless they were copied."""

    blocks: list[Block]
    objects: list[tuple[str, Any]]
    counts: dict[str, int]

    def copied_to(self, memory: SharedMemory) -> Snapshot:
        """The same with copies in host memory, which stay until the memory is used again. It is not pinned: a forked
        process does not have pinned memory."""
        copies = memory.copy(block.tensor for block in self.blocks)
        return replace(self, blocks=[replace(b, tensor=t) for b, t in zip(self.blocks, copies, strict=True)])


def take_snapshot(chunks: Sequence[Any], optimizer: Any, schedule: Any) -> Snapshot:
    """This rank's share of the state. `chunks` are DDP's, their parameters complete."""
    pieces = _pieces(chunks)
    ours = [_whole(p) for p in pieces if not any(p.replica)]
    for shard, key, piece, values, offset, shape in _optimizer_blocks(pieces, optimizer):
        # Of parts that data-parallel ranks share out, each saves its own.
        if not any(piece.replica[:-1] if shard.is_shared_out else piece.replica):
            ours.append(piece.block(key, values, offset, shape))
    objects = [(o.unique_key, [o.data]) for o in _sharded(chunks, ShardedObject) if not any(o.replica_id)]
    return Snapshot(ours, objects, {"optimizer_steps": steps_done(optimizer), "schedule_steps": schedule.num_steps})


def blocks_to_load(chunks: Sequence[Any], optimizer: Any, *, weights_only: bool) -> list[Block]:
    """What this rank reads, as views into the model and the optimizer."""
    pieces = _pieces(chunks)
    wanted = [_whole(p) for p in pieces]
    if not weights_only:
        wanted += [p.block(key, v, o, s) for _, key, p, v, o, s in _optimizer_blocks(pieces, optimizer)]
    return wanted


def after_loading(optimizer: Any, schedule: Any, counts: Mapping[str, int], *, weights_only: bool) -> None:
    """Bring to the new values what is not saved: copies of weights, AdamW's counts, the learning rate."""
    for shard in optimizer_shards(optimizer):
        if weights_only or shard.main.dtype == shard.parameter.dtype:
            shard.follow_parameter()
    set_steps_done(optimizer, 0 if weights_only else counts["optimizer_steps"])
    schedule.num_steps = counts["schedule_steps"]
    schedule.step(0)


def _whole(piece: _Piece) -> Block:
    shape = piece.sharded.local_shape
    return piece.block(piece.sharded.key, piece.tensor, [0] * len(shape), shape)


def _sharded(chunks: Sequence[Any], kind: type) -> Iterator[Any]:
    for chunk in chunks:
        state = chunk.module.sharded_state_dict(metadata=dict(_METADATA))
        yield from (value for value in nested_values(state) if isinstance(value, kind))


def _pieces(chunks: Sequence[Any]) -> list[_Piece]:
    """All blocks of the model's tensors on this rank."""
    pieces = []
    for base in _sharded(chunks, ShardedTensor | ShardedTensorFactory):  # type: ignore[arg-type]
        built = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
        for sharded in built:
            ahead = sharded.data.data_ptr() - base.data.data_ptr()
            start, rest = divmod(ahead, base.data.element_size())
            assert sharded.data.is_contiguous() and rest == 0, f"{sharded.key} is no contiguous part of its parameter"
            assert 0 <= start <= base.data.numel() - sharded.data.numel(), f"{sharded.key} is no part of its parameter"
            pieces.append(_Piece(sharded, id(base.data), start))
    return pieces


def _optimizer_blocks(
    pieces: Sequence[_Piece], optimizer: Any
) -> Iterator[tuple[OptimizerShard, str, _Piece, Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Each block of the optimizer's state on this rank: its shard, key, the weight's block it belongs to, its values,
    and offset and shape inside that block."""
    by_owner: dict[int, list[_Piece]] = {}
    for piece in pieces:
        by_owner.setdefault(piece.owner, []).append(piece)
    for shard in optimizer_shards(optimizer):
        found = by_owner.get(id(shard.parameter))
        assert found, "a parameter that Megatron does not save"
        covered = 0
        for piece in found:
            size = piece.sharded.data.numel()
            start = max(0, shard.start - piece.start)  # in the piece
            stop = min(size, shard.start + shard.main.numel() - piece.start)
            if start >= stop:
                continue
            covered += stop - start
            at = piece.start + start - shard.start  # in the shard
            for offset, shape in rectangles(piece.sharded.local_shape, start, stop):
                count = int(np.prod(shape))
                for name, values in shard.saved.items():
                    key = f"{OPTIMIZER_KEY}.{name}.{piece.sharded.key}"
                    yield shard, key, piece, values[at : at + count], offset, shape
                at += count
        assert covered == shard.main.numel(), "a parameter whose blocks do not make it up"


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """This rank's generators as plain values: Python's, NumPy's, torch's, the device's and Megatron's."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    states["megatron"] = {key: state.cpu().numpy().tobytes().hex() for key, state in tracked.items()}
    return states


def set_random_state(states: Mapping[str, Any]) -> None:
    """Inverse of `random_state`, on a rank with the same kind of device."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((states["numpy"][0], np.array(states["numpy"][1], dtype=np.uint32), *states["numpy"][2:]))
    torch.set_rng_state(_bytes(states["torch"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({key: _bytes(state) for key, state in states["megatron"].items()})


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
