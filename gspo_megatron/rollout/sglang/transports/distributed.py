"""Weights by broadcast in a process group of one sending rank and all ranks of all servers.

Each sender has a group of its own, in which it is rank 0: SGLang receives from rank 0. Groups stay for the run and are
made anew after a failure or when a server went away or came back.

Over gloo a server joins when the group is opened, over NCCL only in the first broadcast, which waits for it without
end. Nor does an NCCL broadcast that a server breaks off end by itself. So broadcasts run in threads of their own, which
are given up when their time is over, and a given-up group is aborted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, BackendConfig, PrefixStore

from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
from gspo_megatron.rollout.sglang.client import ServerClient
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.transports.base import Feed
from gspo_megatron.weights.gather import FlatBucket
from gspo_megatron.weights.reshard import ReshardPlan

_POLL_S = 0.0005
_REFUSAL_S = 0.2  # a server that refuses to join says so at once; one that joins waits for the others
_NAMING_S = 2.0  # that a request may fail after the broadcast it belongs to
_counter = itertools.count()

T = TypeVar("T")


class DistributedTransport:
    """Over gloo for tensors in host memory, over NCCL for those on a GPU."""

    needs_session = True

    def __init__(
        self,
        pool: ServerPool,
        *,
        device: torch.device,
        timeout_s: float,
        ranks_of: dict[ServerAddress, int],
        master_address: str = "",
    ) -> None:
        """`ranks_of`: how many ranks each server has."""
        self.pool, self.timeout_s, self.ranks_of, self.master_address = pool, timeout_s, ranks_of, master_address
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: _Group | None = None

    def begin(self, version: int, feed: Feed | None, *, sends: bool) -> None:
        if not sends or feed is None:
            return
        if self._group is not None and self._group.servers != feed.servers:
            self.reset()
        if self._group is None:
            self._group = self._join(feed.servers)

    def _join(self, servers: Sequence[ServerAddress]) -> _Group:
        """Open a group and have the servers' ranks join it."""
        deadline = time.monotonic() + self.timeout_s + _NAMING_S
        timeout = timedelta(seconds=self.timeout_s)
        name = f"gspo-{os.getpid()}-{socket.gethostname()}-{next(_counter)}-{time.time_ns()}"
        world_size = 1 + sum(self.ranks_of[s] for s in servers)
        store = dist.TCPStore(
            "0.0.0.0", 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        address = self.master_address or local_address(servers)
        offsets = itertools.accumulate((self.ranks_of[s] for s in servers), initial=1)
        offset_of = dict(zip(servers, offsets, strict=False))

        async def join(client: ServerClient) -> None:
            offset = offset_of[client.address]
            await client.init_group(address, store.port, offset, world_size, name, self.backend)

        joining = self._call(servers, join)
        concurrent.futures.wait(joining, timeout=_REFUSAL_S, return_when=concurrent.futures.FIRST_EXCEPTION)
        _raise_failed(joining)
        # As sglang's init_custom_process_group builds it; built here so that it depends neither on the default group
        # nor on its device.
        prefixed = PrefixStore(f"{name}/", PrefixStore(name, store))
        device = next(iter(BackendConfig(Backend(self.backend)).get_device_backend_map()))
        with _naming(joining):
            backend = self._backend(PrefixStore(f"{device}/", prefixed), world_size, name)
        _wait(joining, deadline)
        return _Group(name, tuple(servers), store, backend)

    def _backend(self, store: dist.Store, world_size: int, name: str) -> Any:
        timeout = timedelta(seconds=self.timeout_s)
        if self.backend == "gloo":
            return dist.ProcessGroupGloo(store, 0, world_size, timeout=timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.global_ranks_in_group = []
        options.group_name = name  # type: ignore[assignment]
        # Without a watchdog, which would end this process some time after a server broke a broadcast off, however well
        # the update went when it was made again. What goes wrong is seen by `send`.
        with environment("TORCH_NCCL_BLOCKING_WAIT", "1"):  # read here and never again
            return dist.ProcessGroupNCCL(store, 0, world_size, options)

    def send(self, bucket: FlatBucket) -> None:
        assert self._group is not None, "send before begin"
        group = self._group
        names = [item.name for item in bucket.tensors]
        dtypes = [str(item.tensor.dtype).removeprefix("torch.") for item in bucket.tensors]
        shapes = [list(item.tensor.shape) for item in bucket.tensors]
        deadline = time.monotonic() + self.timeout_s + _NAMING_S
        requests = self._call(
            group.servers, lambda client: client.update_from_distributed(names, dtypes, shapes, group.name)
        )
        sending = _in_thread(lambda: _broadcast(group, bucket.flat))
        # A server that refuses never joins the broadcast: look at the answers while it runs.
        running = {sending, *requests}
        while not sending.done():
            left_s = max(0.0, deadline - time.monotonic())
            done, running = concurrent.futures.wait(running, left_s, concurrent.futures.FIRST_COMPLETED)
            _raise_failed(requests)
            if not done:
                raise RuntimeError(f"a broadcast to the servers did not end within {self.timeout_s:g} s")
        with _naming(requests):
            sending.result()
        _wait(requests, deadline)

    def finish(self, plan: ReshardPlan) -> None:
        """Nothing is left to do: each bucket is loaded when its request is answered."""

    def reset(self) -> None:
        """Leave the group. Its broadcasts in flight end with it, or are left to their threads."""
        group, self._group = self._group, None
        if group is None:
            return
        clients = [client for client in self.pool.clients if client.address in group.servers]
        leaving = [self.pool.loop.submit(client.destroy_group(group.name)) for client in clients]
        # At the same time: NCCL's ranks on one machine wait for one another when they leave.
        aborting = [_in_thread(group.backend.abort)] if self.backend == "nccl" else []
        concurrent.futures.wait([*leaving, *aborting], self.timeout_s)
        for future in leaving:
            with contextlib.suppress(ServerError, TimeoutError):  # it is gone, or never joined
                future.result(0)
        for aborted in aborting:
            if not aborted.done():
                raise RuntimeError(f"NCCL did not let go of a broken broadcast within {self.timeout_s:g} s")
            aborted.result()

    def close(self) -> None:
        self.reset()

    def _call(self, servers: Sequence[ServerAddress], call: Any) -> list[concurrent.futures.Future[None]]:
        clients = [client for client in self.pool.clients if client.address in servers]
        assert len(clients) == len(servers), "a server of the group is not in the pool"
        return [self.pool.loop.submit(call(client)) for client in clients]


@dataclass(frozen=True)
class _Group:
    """A process group with servers."""

    name: str
    servers: tuple[ServerAddress, ...]
    store: dist.Store  # lives as long as the group
    backend: Any


def _broadcast(group: _Group, flat: Tensor) -> None:
    """Send to all of the group. Returns when the data has left, or the group gave up; over NCCL perhaps never."""
    if flat.is_cuda:
        torch.cuda.set_device(flat.device)  # a thread starts with the first one
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.backend.broadcast([flat], options)
    while not work.is_completed():
        time.sleep(_POLL_S)  # in Python: a thread that wakes up elsewhere after the program's end makes it crash
    work.wait()  # raises what it failed with


def _in_thread(call: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Make a call that may never return: it keeps neither the caller nor the end of the process waiting."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weights-group", daemon=True).start()
    return future


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable for what is read, or which processes are started, meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _naming(requests: Sequence[concurrent.futures.Future[None]]) -> Iterator[None]:
    """Of a failure that names no server, raise the request's that does, if there is one."""
    try:
        yield
    except RuntimeError:
        concurrent.futures.wait(requests, timeout=_NAMING_S, return_when=concurrent.futures.FIRST_EXCEPTION)
        _raise_failed(requests)
        raise


def _wait(futures: Sequence[concurrent.futures.Future[None]], deadline: float) -> None:
    for future in futures:
        future.result(max(0.0, deadline - time.monotonic()))


def _raise_failed(futures: Sequence[concurrent.futures.Future[None]]) -> None:
    for future in futures:
        if future.done():
            future.result()


def local_address(servers: Sequence[ServerAddress]) -> str:
    """This machine's address as the servers see it: of the interface that the way to them takes."""
    found = []
    for server in servers:
        parts = urlsplit(server.url)
        info = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect(info[4])
            found.append(str(probe.getsockname()[0]))
    elsewhere = [address for address in found if not address.startswith("127.") and address != "::1"]
    return (elsewhere or found)[0]
