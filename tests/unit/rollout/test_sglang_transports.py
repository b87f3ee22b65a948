"""The ways of the weights to servers, over fake servers that receive as SGLang does, and what failures do to them."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing
from aiohttp import web
from fake_sglang_server import FakeServer
from torch.multiprocessing import reductions

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerError, ServerRefused, ServerUnavailable
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.transports import distributed, tensor
from gspo_megatron.rollout.sglang.transports.base import Feed
from gspo_megatron.rollout.sglang.transports.distributed import DistributedTransport
from gspo_megatron.rollout.sglang.transports.tensor import TensorTransport, serialize
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.gather import FlatBucket

INIT, DESTROY = "/init_weights_update_group", "/destroy_weights_update_group"
RECEIVE, OPEN, CHECK = "/update_weights_from_distributed", "/update_weights_from_tensor", "/weights_checker"
SERVER_TIMEOUT = timedelta(seconds=3)  # of what servers wait for; SGLang's is half an hour
TIMEOUT_S = 20.0
IMPATIENT_S = 0.4
AT_ONCE_S = 5.0  # much less than TIMEOUT_S, and enough for a busy machine

Work = Callable[[Any], dict[str, Any]]


def refuse(body: Any) -> dict[str, Any]:
    return {"success": False, "message": "not today"}


class Receiver(FakeServer):
    """Joins groups and receives buckets with `ranks` ranks, as SGLang's init_custom_process_group and WeightUpdater do.

    `work` by path: what a request is answered with, worked out in a thread.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.groups: dict[str, list[Any]] = {}
        self.received: list[dict[str, torch.Tensor]] = []  # by rank 0, after all ranks have
        self.broken = threading.Event()  # a broadcast ended with an error
        self.receiving, self.released = threading.Event(), threading.Event()
        self.work: dict[str, Work] = {INIT: self.join, DESTROY: self.leave, RECEIVE: self.receive}
        super().__init__()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path not in self.work:
            return await super()._handle(request)
        assert request.transport is not None
        self._transports.add(request.transport)
        body = json.loads(await request.read())
        self.requests.append((request.path, body, None))
        return web.json_response(await asyncio.to_thread(self.work[request.path], body))

    def hang(self, body: Any) -> dict[str, Any]:
        self.released.wait()
        return {}

    def join(self, body: Any) -> dict[str, Any]:
        self.groups[body["group_name"]] = self._on_ranks(lambda rank: self._open(body, rank))
        return {"success": True}

    def _open(self, body: Any, rank: int) -> Any:
        name, size = body["group_name"], body["world_size"]
        store = dist.TCPStore(body["master_address"], body["master_port"], size, False, SERVER_TIMEOUT)
        prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
        assert body["backend"] == "gloo"
        return dist.ProcessGroupGloo(prefixed, body["rank_offset"] + rank, size, SERVER_TIMEOUT)

    def leave(self, body: Any) -> dict[str, Any]:
        return {"success": self.groups.pop(body["group_name"], None) is not None}

    def receive(self, body: Any) -> dict[str, Any]:
        assert body["load_format"] == "flattened_bucket"
        kinds = [(getattr(torch, d), s) for d, s in zip(body["dtypes"], body["shapes"], strict=True)]
        sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds]
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0

        def broadcast(rank: int) -> torch.Tensor:
            flat = torch.zeros(sum(sizes), dtype=torch.uint8)
            groups[rank].broadcast([flat], options).wait()
            return flat

        groups = self.groups[body["group_name"]]
        self.receiving.set()
        try:
            flats = self._on_ranks(broadcast)
        except RuntimeError as error:
            self.broken.set()
            return {"success": False, "message": str(error)}
        assert all(torch.equal(flat, flats[0]) for flat in flats)
        pieces = [p.view(d).view(s) for p, (d, s) in zip(flats[0].split(sizes), kinds, strict=True)]
        self.received.append(dict(zip(body["names"], pieces, strict=True)))
        return {"success": True}

    def _on_ranks(self, call: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.ranks) as each:
            return list(each.map(call, range(self.ranks)))

    def close(self) -> None:
        self.released.set()
        super().close()


class Stage:
    """Servers, and the pool through which a transport reaches them."""

    def __init__(self, stack: ExitStack, ranks: Sequence[int]) -> None:
        self.servers = [Receiver(r) for r in ranks]
        for server in self.servers:
            stack.callback(server.close)
        self.addresses = tuple(server.address for server in self.servers)
        self.ranks_of = dict(zip(self.addresses, ranks, strict=True))
        self.pool = ServerPool(self.addresses, SGLangConfig(update_timeout_s=TIMEOUT_S))
        stack.callback(self.pool.close)
        self.feed = Feed((0,), self.addresses)

    def distributed(self, kind: type[DistributedTransport] = DistributedTransport, **options: Any) -> Any:
        options = {"device": torch.device("cpu"), "ranks_of": self.ranks_of, "timeout_s": TIMEOUT_S} | options
        return kind(self.pool, **options)

    def wait_for(self, transport: Any, timeout_s: float) -> None:
        """Change how long the transport and the calls wait."""
        transport.timeout_s = timeout_s
        for client in self.pool.clients:
            client._update_timeout_s = timeout_s

    def tensor(self) -> TensorTransport:
        return TensorTransport(self.pool, timeout_s=TIMEOUT_S, ranks_of=self.ranks_of)


@pytest.fixture
def build() -> Iterator[Callable[..., Stage]]:
    with ExitStack() as stack:
        yield lambda *ranks: Stage(stack, ranks)


def make_bucket(seed: int = 0) -> FlatBucket:
    flat = torch.randint(0, 256, (4 * 6 + 2 * 10,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    first, second = flat.split([24, 20])
    tensors = [("first", first.view(torch.float32).view(2, 3)), ("second", second.view(torch.bfloat16))]
    return FlatBucket(flat, [NamedTensor(name, tensor) for name, tensor in tensors])


def assert_received(server: Receiver, buckets: Sequence[FlatBucket]) -> None:
    assert len(server.received) == len(buckets)
    for received, bucket in zip(server.received, buckets, strict=True):
        assert list(received) == [item.name for item in bucket.tensors]
        for item in bucket.tensors:
            got = received[item.name]
            assert (got.dtype, got.shape) == (item.tensor.dtype, item.tensor.shape)
            assert torch.equal(got.view(torch.uint8), item.tensor.view(torch.uint8))


def failure_of(call: Callable[[], object]) -> Exception:
    """What the call raises, in time."""
    start = time.monotonic()
    with pytest.raises((RuntimeError, TimeoutError)) as caught:
        call()
    assert time.monotonic() - start < AT_ONCE_S
    return caught.value


def assert_blames(error: Exception, server: Receiver) -> None:
    assert isinstance(error, ServerError)
    assert error.address == server.address and server.address.url in str(error)


def begin(transport: Any, stage: Stage) -> None:
    transport.begin(1, stage.feed, sends=True)


def test_every_rank_of_every_server_gets_the_buckets_in_one_group(build: Callable[..., Stage]) -> None:
    stage = build(2, 1)
    transport = stage.distributed()
    buckets = [make_bucket(seed) for seed in range(3)]
    for _ in range(2):  # updates
        begin(transport, stage)
        for bucket in buckets:
            transport.send(bucket)
    for server in stage.servers:
        assert_received(server, buckets * 2)
        [joined] = server.bodies(INIT)
        assert joined["world_size"] == 4
    assert [server.bodies(INIT)[0]["rank_offset"] for server in stage.servers] == [1, 3]
    transport.close()
    assert not any(server.groups for server in stage.servers)


def test_a_rank_that_sends_nothing_joins_nothing(build: Callable[..., Stage]) -> None:
    stage = build(1)
    transport = stage.distributed()
    transport.begin(1, stage.feed, sends=False)
    transport.begin(1, None, sends=False)
    transport.close()
    assert not stage.servers[0].requests


def test_a_group_is_left_and_made_anew_when_servers_go_away(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport, bucket = stage.distributed(), make_bucket()
    begin(transport, stage)
    left = Feed((0,), stage.addresses[1:])
    transport.begin(2, left, sends=True)
    transport.send(bucket)
    assert_received(stage.servers[1], [bucket])
    first, second = stage.servers[1].bodies(INIT)
    assert first["group_name"] != second["group_name"] and second["world_size"] == 2
    assert [body["group_name"] for body in stage.servers[0].bodies(DESTROY)] == [first["group_name"]]


@pytest.mark.parametrize("step", [INIT, RECEIVE])
def test_a_server_that_refuses_is_named_at_once(step: str, build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport, bucket = stage.distributed(), make_bucket()
    stage.servers[1].work[step] = refuse

    def update() -> None:
        begin(transport, stage)
        transport.send(bucket)

    error = failure_of(update)  # the other server waits for it
    assert_blames(error, stage.servers[1])
    assert isinstance(error, ServerRefused) and "not today" in str(error)

    transport.reset()
    stage.servers[1].work[step] = stage.servers[1].join if step == INIT else stage.servers[1].receive
    update()
    assert_received(stage.servers[1], [bucket])
    names = [body["group_name"] for body in stage.servers[1].bodies(INIT)]
    assert len(set(names)) == 2


def test_a_server_that_waits_in_a_broken_broadcast_is_let_go(build: Callable[..., Stage]) -> None:
    stage = build(1, 1, 1)
    transport = stage.distributed()
    begin(transport, stage)
    refusing, _, waiting = stage.servers  # gloo sends to the third by the first
    refusing.work[RECEIVE] = lambda body: refuse(waiting.receiving.wait())
    failure_of(lambda: transport.send(make_bucket()))
    assert not waiting.broken.is_set()
    transport.reset()
    assert waiting.broken.wait(SERVER_TIMEOUT.total_seconds() / 2)


@pytest.mark.parametrize("step", [INIT, RECEIVE])
def test_a_server_that_hangs_is_named_when_its_time_is_over(step: str, build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport, bucket = stage.distributed(), make_bucket()
    hanging = stage.servers[0]
    hanging.work[step] = hanging.work[DESTROY] = hanging.hang
    if step == RECEIVE:
        begin(transport, stage)
    stage.wait_for(transport, IMPATIENT_S)
    error = failure_of(lambda: begin(transport, stage) if step == INIT else transport.send(bucket))
    assert_blames(error, hanging)
    assert isinstance(error, ServerUnavailable) and f"{IMPATIENT_S} s" in str(error)

    start = time.monotonic()
    transport.reset()
    assert time.monotonic() - start < AT_ONCE_S
    stage.wait_for(transport, TIMEOUT_S)
    hanging.work |= {INIT: hanging.join, RECEIVE: hanging.receive}
    begin(transport, stage)
    transport.send(bucket)
    assert_received(hanging, [bucket])


def test_a_server_that_dies_while_it_receives_is_named_at_once(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport = stage.distributed()
    begin(transport, stage)
    dying = stage.servers[1]
    dying.work[RECEIVE] = dying.hang
    threading.Timer(0.1, dying.die).start()
    error = failure_of(lambda: transport.send(make_bucket()))
    assert_blames(error, dying)


class FakeNccl:
    """ProcessGroupNCCL and its works, as far as they are used. Each step of a broadcast may be held up."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.joined, self.arrived = threading.Event(), threading.Event()  # the servers' ranks; the data
        self.sent: list[torch.Tensor] = []
        self.error = ""  # of a broadcast

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> FakeNccl:
        assert options.rootRank == 0
        self.joined.wait()  # as ncclCommInitRank: not even an abort ends it
        self.sent += tensors
        return self

    def is_completed(self) -> bool:
        return self.arrived.is_set() or self.aborted.is_set() or self.error != ""

    def wait(self) -> None:
        assert self.is_completed(), "it returns at once: the order of streams is all that it sees to"
        if self.error:
            raise RuntimeError(self.error)

    def abort(self) -> None:
        self.aborted.set()


class OverNccl(DistributedTransport):
    """With fakes for NCCL's groups: `ready` ones find their servers and send."""

    ready = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"device": torch.device("cuda")})
        self.groups: list[FakeNccl] = []

    def _backend(self, store: dist.Store, world_size: int, name: str) -> FakeNccl:
        group = FakeNccl()
        if self.ready:
            group.joined.set()
            group.arrived.set()
        self.groups.append(group)
        return group


def over_nccl(stage: Stage, *, ready: bool) -> OverNccl:
    """A transport with an open group, and servers that do as they should."""
    for server in stage.servers:
        server.work = {}  # says yes to everything
    transport: OverNccl = stage.distributed(OverNccl)
    transport.ready = ready
    begin(transport, stage)
    return transport


def assert_works_again(transport: OverNccl, stage: Stage) -> None:
    for server in stage.servers:
        server.work = {}
    stage.wait_for(transport, TIMEOUT_S)
    transport.ready = True
    begin(transport, stage)
    bucket = make_bucket()
    transport.send(bucket)
    first, second = transport.groups
    assert first.aborted.is_set() and not second.aborted.is_set()
    assert second.sent == [bucket.flat]


def test_over_nccl_a_server_that_never_joins_the_first_broadcast_does_not_block_the_sender(
    build: Callable[..., Stage],
) -> None:
    stage = build(1, 1)
    transport = over_nccl(stage, ready=False)
    stage.wait_for(transport, IMPATIENT_S)
    stage.servers[1].work[RECEIVE] = stage.servers[1].hang
    error = failure_of(lambda: transport.send(make_bucket()))
    assert_blames(error, stage.servers[1])
    transport.reset()
    assert_works_again(transport, stage)
    transport.groups[0].joined.set()  # the thread ends


def test_over_nccl_a_refusal_is_heard_while_the_first_broadcast_waits(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport = over_nccl(stage, ready=False)
    stage.servers[1].work[RECEIVE] = refuse
    error = failure_of(lambda: transport.send(make_bucket()))
    assert_blames(error, stage.servers[1])
    transport.reset()
    assert_works_again(transport, stage)
    transport.groups[0].joined.set()


def test_over_nccl_a_broadcast_that_does_not_end_is_given_up_and_aborted(
    build: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_NAMING_S", 0.1)
    stage = build(1)
    transport = over_nccl(stage, ready=False)
    stage.wait_for(transport, IMPATIENT_S)
    transport.groups[0].joined.set()
    error = failure_of(lambda: transport.send(make_bucket()))  # the server has answered
    assert isinstance(error, RuntimeError) and f"did not end within {IMPATIENT_S} s" in str(error)
    transport.reset()
    assert_works_again(transport, stage)


def test_over_nccl_a_broken_broadcast_is_laid_to_the_server_that_broke_it(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport = over_nccl(stage, ready=False)
    transport.groups[0].joined.set()
    transport.groups[0].error = "NCCL error: remote process exited or there was a network error"
    dying = stage.servers[0]
    dying.work[RECEIVE] = lambda body: dying.released.wait(0.2) or refuse(body)  # type: ignore[return-value]
    assert_blames(failure_of(lambda: transport.send(make_bucket())), dying)


def test_over_nccl_servers_and_trainer_leave_a_group_together(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    transport = over_nccl(stage, ready=True)
    [group] = transport.groups
    leaving, together = threading.Barrier(3), []

    def leave(*arguments: Any) -> dict[str, Any]:
        together.append(leaving.wait(5.0))
        return {"success": True}

    for server in stage.servers:
        server.work[DESTROY] = leave
    group.abort = leave  # type: ignore[assignment,method-assign]
    transport.close()
    assert len(together) == 3


def test_over_nccl_an_abort_that_hangs_is_an_error_in_time(build: Callable[..., Stage]) -> None:
    stage = build(1)
    transport = over_nccl(stage, ready=True)
    stage.wait_for(transport, IMPATIENT_S)
    hung = threading.Event()
    transport.groups[0].abort = hung.wait  # type: ignore[assignment,method-assign]
    error = failure_of(transport.reset)
    assert "did not let go" in str(error)
    transport.groups[0].aborted.set()
    assert_works_again(transport, stage)
    hung.set()


@pytest.mark.parametrize("before", [None, "0"])
def test_nccl_groups_have_no_watchdog(
    before: str | None, build: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog ends the process that has it; see TORCH_NCCL_BLOCKING_WAIT in torch's ProcessGroupNCCL."""
    name, seen = "TORCH_NCCL_BLOCKING_WAIT", []

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, store: dist.Store, rank: int, size: int, options: Any) -> None:
            assert options._timeout == timedelta(seconds=TIMEOUT_S)
            seen.append((rank, size, os.environ.get(name)))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    stage = build(1, 1)
    for server in stage.servers:
        server.work = {}
    begin(stage.distributed(device=torch.device("cuda")), stage)
    assert seen == [(0, 3, "1")]
    assert os.environ.get(name) == before
    assert {body["backend"] for server in stage.servers for body in server.bodies(INIT)} == {"nccl"}


OPEN_ELSEWHERE = """
import base64, json, pickle, sys, torch
opened = [pickle.loads(base64.b64decode(text)) for text in json.load(sys.stdin)]
print(json.dumps([[(n, str(t.dtype), list(t.shape), t.view(torch.uint8).tolist()) for n, t in o] for o in opened]))
"""


@pytest.fixture
def sharing_strategy() -> Iterator[None]:
    before = torch_multiprocessing.get_sharing_strategy()
    yield
    torch_multiprocessing.set_sharing_strategy(before)


@pytest.mark.usefixtures("sharing_strategy")
def test_another_process_opens_what_is_sent_through_memory(build: Callable[..., Stage]) -> None:
    stage = build(2)
    opened: list[list[Any]] = []

    def load(body: Any) -> dict[str, Any]:
        text = json.dumps(body["serialized_named_tensors"])
        command = [sys.executable, "-c", OPEN_ELSEWHERE]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        opened.append(json.loads(done.stdout))
        return {"success": True}

    stage.servers[0].work[OPEN] = load
    transport, bucket = stage.tensor(), make_bucket()
    begin(transport, stage)
    transport.send(bucket)
    named = [(item.name, item.tensor) for item in bucket.tensors]
    expected = [[name, str(t.dtype), list(t.shape), t.view(torch.uint8).tolist()] for name, t in named]
    assert opened == [[expected, expected]]  # each rank has handles of its own
    assert stage.servers[0].bodies(OPEN)[0]["load_format"] is None
    assert not stage.servers[0].bodies(CHECK)


@pytest.mark.usefixtures("sharing_strategy")
def test_the_buffer_is_kept_until_the_slowest_server_has_read_it_also_after_a_refusal(
    build: Callable[..., Stage],
) -> None:
    stage = build(1, 1)
    ended: list[float] = []
    stage.servers[0].work[OPEN] = refuse
    stage.servers[1].work[OPEN] = lambda body: ended.append(time.sleep(0.3) or time.monotonic()) or {}  # type: ignore[func-returns-value]
    transport = stage.tensor()
    begin(transport, stage)
    error = failure_of(lambda: transport.send(make_bucket()))
    assert ended
    assert_blames(error, stage.servers[0])


@pytest.mark.usefixtures("sharing_strategy")
def test_a_server_that_hangs_while_it_reads_memory_is_named(build: Callable[..., Stage]) -> None:
    stage = build(1, 1)
    stage.servers[1].work[OPEN] = stage.servers[1].hang
    transport = stage.tensor()
    stage.wait_for(transport, IMPATIENT_S)
    begin(transport, stage)
    error = failure_of(lambda: transport.send(make_bucket()))
    assert_blames(error, stage.servers[1])
    assert f"{IMPATIENT_S} s" in str(error)


@pytest.mark.usefixtures("sharing_strategy")
def test_a_server_whose_ranks_are_not_done_in_time_is_named(
    build: Callable[..., Stage], gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor, "_SLACK_S", 0.1)
    stage = build(1, 2)
    stage.servers[0].work[OPEN] = stage.servers[1].work[OPEN] = lambda body: {}
    stage.servers[1].work[CHECK] = stage.servers[1].hang
    transport = stage.tensor()
    begin(transport, stage)
    transport.timeout_s = IMPATIENT_S  # the call itself waits longer
    error = failure_of(lambda: transport.send(on_gpu()))
    assert_blames(error, stage.servers[1])
    assert f"{IMPATIENT_S} s" in str(error)


class OnGpu(torch.Tensor):
    """Says that it is on GPU 3."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 3)  # type: ignore[assignment]


def on_gpu() -> FlatBucket:
    flat = torch.zeros(24, dtype=torch.uint8)
    weight = flat.view(torch.float32).view(2, 3).as_subclass(OnGpu)
    return FlatBucket(flat.as_subclass(OnGpu), [NamedTensor("weight", weight)])


def rebuild(*arguments: Any) -> tuple[Any, ...]:
    """In place of torch's rebuild_cuda_tensor."""
    return arguments


HANDLE = (torch.Tensor, (2, 3), (3, 1), 0, torch.UntypedStorage, torch.float32, 3, b"handle", 24, 0, True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU as far as handles of its memory are made; what happened on it."""
    happened: list[str] = []

    def reduce(tensor: torch.Tensor) -> tuple[Any, Any]:
        happened.append("handle")
        return rebuild, HANDLE

    stream = SimpleNamespace(synchronize=lambda: happened.append("synchronize"))
    monkeypatch.setattr(reductions, "reduce_tensor", reduce)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid of GPU {index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return happened


def test_a_gpu_is_named_by_its_uuid(gpu: list[str]) -> None:
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[6] == "storage_device"
    in_host_memory = torch.arange(3)
    text = serialize([("first", torch.ones(2, 3).as_subclass(OnGpu)), ("second", in_host_memory)])
    [(first, arguments), (second, opened)] = pickle.loads(base64.b64decode(text))
    assert (first, second) == ("first", "second")
    assert arguments == (*HANDLE[:6], "uuid of GPU 3", *HANDLE[7:])
    assert gpu == ["handle"]
    assert torch.equal(opened, in_host_memory)


@pytest.mark.usefixtures("sharing_strategy")
def test_on_gpus_every_rank_of_a_server_is_done_before_the_buffer_is_given_away(
    build: Callable[..., Stage], gpu: list[str]
) -> None:
    stage = build(2, 1)
    done: list[str] = []

    def check(body: Any) -> dict[str, Any]:
        assert body["action"] == "checksum" and body["skip_tensor_list"] == [""]
        time.sleep(0.2)
        done.append("ranks")
        return {"success": True, "ranks": [{}, {}]}

    for server in stage.servers:
        server.work[OPEN] = lambda body: done.append("first rank") or {}  # type: ignore[func-returns-value]
        server.work[CHECK] = check
    transport = stage.tensor()
    begin(transport, stage)
    transport.send(on_gpu())
    assert sorted(done) == ["first rank", "first rank", "ranks"] and done[-1] == "ranks"
    assert [server.bodies(CHECK) != [] for server in stage.servers] == [True, False]
    assert gpu == ["synchronize", "handle", "handle", "handle"]
