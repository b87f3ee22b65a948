"""Weights to servers on the same machine without a copy on the way: shared memory on a CPU, CUDA IPC on a GPU.

A server is sent pickled handles of the bucket's tensors, as torch.multiprocessing makes them; SGLang opens them.
"""

from __future__ import annotations

import base64
import concurrent.futures
import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from gspo_megatron.rollout.sglang.address import ServerAddress, ServerUnavailable
from gspo_megatron.rollout.sglang.client import ServerClient
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.transports.base import Feed
from gspo_megatron.weights.gather import FlatBucket
from gspo_megatron.weights.reshard import ReshardPlan

_SLACK_S = 2.0  # a call that takes too long says so itself
_DEVICE_INDEX = 6  # of the arguments of torch's rebuild_cuda_tensor: which device the memory is on


class TensorTransport:
    """Handles over HTTP, data through memory."""

    needs_session = True

    def __init__(self, pool: ServerPool, *, timeout_s: float, ranks_of: dict[ServerAddress, int]) -> None:
        """`ranks_of`: how many ranks each server has."""
        self.pool, self.timeout_s, self.ranks_of = pool, timeout_s, ranks_of
        self._servers: tuple[ServerAddress, ...] = ()

    def begin(self, version: int, feed: Feed | None, *, sends: bool) -> None:
        if feed is None or not sends:
            return
        self._servers = feed.servers
        # Descriptors would have to be passed over a socket that SGLang doesn't open: memory is shared by name.
        torch_multiprocessing.set_sharing_strategy("file_system")

    def send(self, bucket: FlatBucket) -> None:
        named = [(item.name, item.tensor) for item in bucket.tensors]
        if bucket.flat.device.type == "cpu":
            bucket.flat.untyped_storage().share_memory_()
        else:
            torch.cuda.current_stream().synchronize()  # the other process knows nothing of this one's stream
        clients = [client for client in self.pool.clients if client.address in self._servers]
        # Each rank of each server gets handles of its own: opening one is counted.
        handles = [[serialize(named) for _ in range(self.ranks_of[client.address])] for client in clients]
        requests = [
            self.pool.loop.submit(_load(client, of_ranks, on_gpu=bucket.flat.is_cuda))
            for client, of_ranks in zip(clients, handles, strict=True)
        ]
        # All of them, also after a failure: the buffer is given away when this returns.
        concurrent.futures.wait(requests, self.timeout_s + _SLACK_S)
        for client, future in zip(clients, requests, strict=True):
            if not future.done():
                raise ServerUnavailable(client.address, "loading a bucket", f"not done within {self.timeout_s:g} s")
            future.result()

    def finish(self, plan: ReshardPlan) -> None:
        """Nothing is left to do: each bucket is loaded when its request is answered."""

    def reset(self) -> None:
        """Nothing is kept between buckets."""

    def close(self) -> None:
        """Nothing is kept between buckets."""


async def _load(client: ServerClient, handles: Sequence[str], *, on_gpu: bool) -> None:
    await client.update_from_tensor(handles)
    if on_gpu and len(handles) > 1:
        # The answer is that of the server's first rank; the GPUs of others may still copy out of the buffer. For
        # checksums, even of nothing, every rank waits for its GPU, and then they exchange them.
        await client.checksums(skip=[""])


def serialize(named: Sequence[tuple[str, Tensor]]) -> str:
    """Base64 of the pickled handles."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(list(named))
    return base64.b64encode(buffer.getvalue()).decode()


class _Pickler(ForkingPickler):
    """torch's reductions, but a GPU is named by its UUID: its number differs between processes that see other GPUs."""

    def reducer_override(self, item: Any) -> Any:
        if not (isinstance(item, Tensor) and item.is_cuda):
            return NotImplemented
        rebuild: Callable[..., Any]
        rebuild, arguments = reductions.reduce_tensor(item)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE_INDEX]).uuid)
        changed = itertools.chain(arguments[:_DEVICE_INDEX], [uuid], arguments[_DEVICE_INDEX + 1 :])
        return rebuild, tuple(changed)
