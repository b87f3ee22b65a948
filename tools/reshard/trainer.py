"""One training rank of benchmark_reshard.py measured: weight updates by the trainer's own engine, and their parts."""

from __future__ import annotations

import ctypes
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.pool import ServerPool
from reshard.receiver import TIMEOUT, broadcast, join_group

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Case:
    """Updates of one kind of servers over one transport."""

    transport: str  # distributed, tensor, disk, or memory: the embedded engine
    servers: tuple[str, ...]
    yardstick: tuple[str, ...]  # bare receivers of the plain broadcast; none: it is not measured
    bucket_mb: int
    repetitions: int
    check: str = "sampled"
    probe_prompts: int = 4
    run_folder: str = ""
    direct: bool = False  # to bare receivers: buckets are announced all at once, with no HTTP between them


@dataclass
class Measured:
    """What one rank saw. Lists have one entry a repetition."""

    plain_s: list[float] = field(default_factory=list)  # the yardstick: one sender to the receivers
    plain_all_s: list[float] = field(default_factory=list)  # in a group of all senders and the receivers
    ready_s: list[float] = field(default_factory=list)  # the update's buckets by one sender that has them ready
    buckets_s: list[float] = field(default_factory=list)  # from the first gather until the last bucket is loaded
    update_s: list[float] = field(default_factory=list)  # from pause to continue
    probe_s: list[float] = field(default_factory=list)  # after it
    parts_s: list[dict[str, float]] = field(default_factory=list)  # of the update
    extra_bytes: int = 0  # resident memory at most, beyond that before the update; of an update by itself
    planned_bytes: int = 0  # ReshardPlan.peak_bytes
    written_bytes: int = 0  # by the kernel's count, in one update's buckets
    gathered_bytes: int = 0  # from other ranks, in one update
    broadcast_bytes: int = 0  # handed to a broadcast, in one update
    model_bytes: int = 0
    num_buckets: int = 0
    num_senders: int = 0


class Rank:
    """A rank with its policy, for all cases of a layout."""

    def __init__(self, layout: dict[str, int], folder: str) -> None:
        from gspo_megatron.config import ModelConfig, OptimizerConfig
        from gspo_megatron.logs import quiet_libraries
        from gspo_megatron.parallel import ParallelLayout
        from gspo_megatron.policy.policy import MegatronPolicy
        from gspo_megatron.policy.runtime import initialize

        quiet_libraries()
        self.folder = folder
        self.groups = initialize(ParallelLayout(**layout), seed=0, timeout_s=TIMEOUT_S)
        model = ModelConfig(path=folder, dtype="bfloat16")
        self.policy = MegatronPolicy(model, OptimizerConfig(), self.groups, seed=0, total_steps=10)

    def measure(self, case: Case) -> Measured:
        """One update to warm up, then the yardstick and updates in turns, then one whose memory is measured."""
        from gspo_megatron import config as c
        from gspo_megatron.job import build_job

        config = c.TrainConfig(
            run=c.RunConfig(folder=case.run_folder),
            model=c.ModelConfig(path=self.folder, dtype="bfloat16"),
            task=c.TaskConfig(name="reasoning_gym", dataset="spell_backward"),
            rollout=c.RolloutConfig(engine="embedded" if case.transport == "memory" else "sglang"),
            eval=c.EvalConfig(prompts=8),
        )
        if case.transport != "memory":
            config = replace(
                config,
                sglang=c.SGLangConfig(
                    addresses=",".join(case.servers), transport=case.transport, bucket_mb=case.bucket_mb,
                    check=case.check, probe_prompts=case.probe_prompts, retries=0,
                ),
            )  # fmt: skip
        result = Measured()
        with build_job(config, self.groups) as job:
            update = Update(self.policy, job, case)
            update.run(0, Measured())
            if case.direct:
                update.send_directly()
            with ExitStack() as stack:
                yardsticks = [(result.plain_s, stack.enter_context(plain_broadcast(job, case, update.plan, [0])))]
                senders = sorted({b.sender for step in update.plan.steps for b in step.buckets})
                if case.direct and len(senders) > 1:
                    plain_all = stack.enter_context(plain_broadcast(job, case, update.plan, senders))
                    yardsticks.append((result.plain_all_s, plain_all))
                elif case.direct:
                    yardsticks.append((result.ready_s, update.send_ready))
                for i in range(case.repetitions):
                    turns = [lambda k=k, y=y: k.append(y()) for k, y in yardsticks]
                    turns.append(lambda i=i: update.run(i + 1, result))
                    for turn in turns if i % 2 else turns[::-1]:
                        self._barrier()
                        turn()
            self._barrier()
            update.measure_memory(case.repetitions + 1, result)
        return result

    def _barrier(self) -> None:
        dist.barrier(group=self.groups.world)


class Update:
    """weight_sync.sync_weights, step by step and timed."""

    def __init__(self, policy: Any, job: Any, case: Case) -> None:
        self.policy, self.job, self.case = policy, job, case
        feeding = job.feeding
        bucket_bytes = case.bucket_mb * 2**20
        self.plan = policy.weights.plan(feeding.feeds, dtype=feeding.dtype, bucket_bytes=bucket_bytes)
        self.clock = Clock(job)
        self._announced: list[dict[str, Any]] | None = None  # buckets that are sent directly

    def send_directly(self) -> None:
        """From the next update on, broadcast buckets that the receivers expect. The groups are open."""
        transport = self.job.engine.transport
        names: list[Any] = [None] * self.job.groups.layout.world_size
        dist.all_gather_object(names, transport._group.name if transport._group else None)
        specs = self.plan.specs
        self._announced = [
            {
                "group_name": names[bucket.sender],
                "names": [name for i in bucket.specs for name in specs[i].hf],
                "shapes": [list(shape) for i in bucket.specs for shape in specs[i].hf_shapes],
            }
            for step in self.plan.steps
            for bucket in step.buckets
        ]
        transport.send = lambda flat: broadcast(transport._group.backend, flat.flat)

    def send_ready(self) -> float:
        """Seconds of sending as much in the same buckets, with nothing to gather or to assemble. Rank 0 sends all."""
        if self.job.groups.rank != 0:
            return 0.0
        sizes = [bucket.nbytes for step in self.plan.steps for bucket in step.buckets]
        flat = torch.ones(max(sizes), dtype=torch.uint8)
        self._tell("/expect")
        start = time.perf_counter()
        for size in sizes:
            broadcast(self.job.engine.transport._group.backend, flat[:size])
        self._tell("/arrived")
        return time.perf_counter() - start

    def _tell(self, path: str) -> None:
        """Rank 0, of direct sending: a call of all receivers."""
        if self._announced is not None and self.job.groups.rank == 0:
            body = self._announced if path == "/expect" else {}
            answers = self.job.engine.pool.on_all(lambda c: c._call("POST", path, body, timeout_s=60))
            assert not any(isinstance(a, Exception) for a in answers), answers

    def run(self, version: int, into: Measured) -> None:
        """One update and its probe."""
        engine, clock, policy = self.job.engine, self.clock, self.policy
        clock.parts.clear()
        counters = policy.weights.counters
        received = counters.received_bytes
        start = time.perf_counter()
        if engine is not None:
            engine.pause()
            engine.begin_update(version)
        self._tell("/expect")
        self._barrier()
        written = written_bytes()
        opened = time.perf_counter()
        for bucket in clock.iterate("gather", policy.export(self.plan)):
            if engine is not None:
                engine.update(bucket)
        if self.case.transport != "memory":
            engine._wait_sent()
        self._barrier()
        self._tell("/arrived")
        sent = time.perf_counter()
        into.written_bytes = written_bytes() - written
        into.gathered_bytes = counters.received_bytes - received
        if engine is not None:
            assert engine.end_update(policy.export)
            engine.resume()
        self._barrier()
        end = time.perf_counter()
        self._probe()
        into.buckets_s.append(sent - opened)
        into.update_s.append(end - start)
        into.probe_s.append(time.perf_counter() - end)
        into.parts_s.append(dict(clock.parts))
        into.broadcast_bytes = int(clock.parts.get("broadcast bytes", 0))
        into.model_bytes, into.num_buckets = self.plan.num_bytes, sum(len(s.buckets) for s in self.plan.steps)
        into.num_senders = len({b.sender for step in self.plan.steps for b in step.buckets})
        into.planned_bytes = self.plan.peak_bytes(self.job.groups.rank)

    def _probe(self) -> None:
        from gspo_megatron.weight_sync import probe

        probe(self.policy, self.job)

    def measure_memory(self, version: int, into: Measured) -> None:
        """The kernel's high-water mark of an update's buckets. Memory that was freed is given back before."""
        engine = self.job.engine
        if engine is not None:
            engine.pause()
            engine.begin_update(version)
        ctypes.CDLL(None).malloc_trim(0)
        self._tell("/expect")
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for bucket in self.policy.export(self.plan):
            if engine is not None:
                engine.update(bucket)
        if self.case.transport != "memory":
            engine._wait_sent()
        self._barrier()
        self._tell("/arrived")
        into.extra_bytes = resident_bytes("VmHWM") - before
        if engine is not None:
            assert engine.end_update(self.policy.export)
            engine.resume()

    def _barrier(self) -> None:
        dist.barrier(group=self.job.groups.world)


class Clock:
    """Adds up the seconds of an update's parts."""

    def __init__(self, job: Any) -> None:
        from gspo_megatron.rollout.sglang.client import ServerClient
        from gspo_megatron.weights.gather import GatheredBucket

        self.parts: defaultdict[str, float] = defaultdict(float)
        self._put(GatheredBucket, "assemble", "assemble")
        engine = job.engine
        transport = getattr(engine, "transport", None)
        if transport is None:
            return
        self._put(engine, "_check", "check")
        self._put(transport, "send", "send")
        self._put(transport, "finish", "finish")
        self._watch_calls(ServerClient)
        if hasattr(transport, "_group"):
            self._watch_broadcasts(transport)

    def _put(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)
        if hasattr(call, "untimed"):  # by the clock of the case before
            call = call.untimed

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.parts[part] += time.perf_counter() - start

        timed.untimed = call  # type: ignore[attr-defined]
        setattr(owner, name, timed)

    def _watch_calls(self, client: Any) -> None:
        call = getattr(client._call, "untimed", client._call)

        async def timed(this: Any, method: str, path: str, *arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return await call(this, method, path, *arguments, **keywords)
            finally:
                self.parts[path] += time.perf_counter() - start

        timed.untimed = call  # type: ignore[attr-defined]
        client._call = timed

    def _watch_broadcasts(self, transport: Any) -> None:
        begin = transport.begin

        def opened(*arguments: Any, **keywords: Any) -> None:
            begin(*arguments, **keywords)
            group = transport._group
            if group is not None and not isinstance(group.backend, TimedBackend):
                transport._group = replace(group, backend=TimedBackend(group.backend, self.parts))

        transport.begin = opened

    def iterate(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            start, assembled = time.perf_counter(), self.parts["assemble"]
            item = next(items, None)
            self.parts[part] += time.perf_counter() - start - (self.parts["assemble"] - assembled)
            if item is None:
                return
            yield item


class TimedBackend:
    """A process group whose broadcasts are timed, from their start to their end at this rank."""

    def __init__(self, backend: Any, parts: defaultdict[str, float]) -> None:
        self.backend, self.parts = backend, parts

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        self.parts["broadcast bytes"] += sum(t.nbytes for t in tensors)
        return TimedWork(self.backend.broadcast(tensors, options), self.parts)


class TimedWork:
    """A broadcast."""

    def __init__(self, work: Any, parts: defaultdict[str, float]) -> None:
        self.work, self.parts, self.start = work, parts, time.perf_counter()

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self, *timeout: Any) -> None:
        self.work.wait(*timeout)
        self.parts["broadcast"] += time.perf_counter() - self.start


@contextmanager
def plain_broadcast(job: Any, case: Case, plan: Any, members: Sequence[int]) -> Iterator[Callable[[], float]]:
    """Seconds of one broadcast of one flat tensor, as large as the model, from rank 0 to the yardstick's receivers and
    the other members, until all have it. Collective over all ranks; 0.0 where it is not measured."""
    if not case.yardstick:
        yield lambda: 0.0
        return
    rank, world_size = job.groups.rank, len(members) + len(case.yardstick)
    place: list[Any] = [None]
    pool = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        place = [(store.port, f"plain-{time.time_ns()}")]
    dist.broadcast_object_list(place, src=0)
    port, name = place[0]
    if rank not in members:
        yield lambda: 0.0
        return
    joining = []
    if rank == 0:
        addresses = [ServerAddress(url, None) for url in case.yardstick]
        pool = ServerPool(addresses, SGLangConfig())
        for i, client in enumerate(pool.clients):
            join = client.init_group("127.0.0.1", port, len(members) + i, world_size, name, "gloo")
            joining.append(pool.loop.submit(join))
    _store, backend = join_group("127.0.0.1", port, members.index(rank), world_size, name)
    for future in joining:
        future.result(60)
    flat = torch.ones(plan.num_bytes, dtype=torch.uint8)

    def measure() -> float:
        if pool is not None:
            body = {"group_name": name, "nbytes": plan.num_bytes}
            pool.on_all(lambda c: c._call("POST", "/plain", body, timeout_s=60))
        start = time.perf_counter()
        broadcast(backend, flat)
        backend.barrier().wait()
        return time.perf_counter() - start

    measure()
    yield measure
    if pool is not None:
        pool.on_all(lambda c: c.destroy_group(name))
        pool.close()


def written_bytes() -> int:
    """By this process, to sockets and files, by the kernel's count."""
    found = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def resident_bytes(name: str) -> int:
    """VmRSS, or VmHWM, its high-water mark."""
    found = re.search(name + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
