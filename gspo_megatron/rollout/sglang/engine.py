"""The rollout engine over SGLang servers: one object on every rank, which together speak to all servers.

Heads generate. Weights come from every rank that the reshard plan makes a sender; rank 0 makes the control calls. Every
verb but `generate` is collective, and ends on all ranks alike: what went wrong on one is known to all.

An update is pause, flush, begin, buckets, version, end, check, continue. Until all of it has succeeded the servers stay
paused, so that none ever generates with weights of two versions. A server that is lost is found out by the next pause,
which starts it again or goes on with the others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gspo_megatron.config import SGLangConfig
from gspo_megatron.device import current_device
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.rollout.engine import Export, Feeding, SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError, ServerRefused
from gspo_megatron.rollout.sglang.client import PARTLY_LOADED, ServerClient
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.roll_call import RollCall
from gspo_megatron.rollout.sglang.served_model import ServedModel
from gspo_megatron.rollout.sglang.transports.base import Feed, Meetings, Transport, TurnLost, Turns
from gspo_megatron.rollout.sglang.weight_check import ServerChecksums, WeightCheck
from gspo_megatron.types import Group, Prompt
from gspo_megatron.weights.gather import FlatBucket, GatheredBucket
from gspo_megatron.weights.reshard import ReshardPlan

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SGLangEngine:
    """RolloutEngine over servers."""

    def __init__(
        self,
        config: SGLangConfig,
        groups: ProcessGroups,
        pool: ServerPool,
        served: Sequence[ServedModel],
        feeds: Sequence[Feed],
        transport: Transport,
        turns: Turns,
        meetings: Meetings,
        weight_check: WeightCheck,
        *,
        num_experts: int | None,
        manager: ServerManager | None,
    ) -> None:
        """`manager` at rank 0, of servers that it may restart."""
        self.config, self.groups, self.pool = config, groups, pool
        self.roll = RollCall(config, pool, served, feeds, manager)
        self.transport, self.turns, self.meetings = transport, turns, meetings
        self.weight_check, self.num_experts = weight_check, num_experts
        [dtype] = {s.dtype for s in served}
        self.feeding = Feeding([list(f.ranks) for f in feeds], dtype, config.bucket_mb * 2**20)
        self._version, self._next_version = -1, -1
        self._epoch = 0  # of attempts to update, alike on all ranks
        self._attempts = 0  # at the present update
        self._errors: list[Exception] = []  # this rank's, of the present attempt
        self._failures: list[str] = []  # all ranks', of the present attempt
        self._refused = False  # whether they are all refusals
        self._turn_lost = False  # this rank gave up because another one failed
        # An attempt may have left something open, or a server is new; at first, that of a trainer that was killed.
        self._half_done = True
        self._updates = 0  # complete ones
        self.reasons: list[str] = []  # why the last `generate` of this rank was not answered by every server
        self._plan: ReshardPlan | None = None
        self._sending: Future[None] | None = None
        self._sender = ThreadPoolExecutor(1, "weights", _use_device, (current_device(),))
        self._resting = False
        self._released: dict[ServerAddress, set[str]] = {}  # rank 0: what the trainer has of each server's memory

    @property
    def name(self) -> str:
        """For logs and metrics."""
        some = next(iter(self.served.values()))
        count = len(self.served)
        return f"sglang {some.sglang_version}, {count} server{'s' if count > 1 else ''} of TP{some.layout.tensor}"

    @property
    def served(self) -> dict[ServerAddress, ServedModel]:
        """The servers that take part."""
        return self.roll.served

    @property
    def version(self) -> int:
        """Version of the weights that all servers hold; -1 before the first update."""
        return self._version

    @property
    def _is_driver(self) -> bool:
        return self.groups.rank == 0

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group | None]:
        """Responses to each prompt; None where servers were lost. Not collective: each head has its own.

        Raises:
            CauseError: servers gave no usable answers, though they are well; with what was wrong.
        """
        assert self._version >= 0, "generate before the first complete update"
        generated = self.pool.generate(prompts, params, version=self._version, routed_experts=params.routes)
        self.reasons = [str(error) for error in generated.errors]
        missing = generated.groups.count(None)
        if missing and generated.errors and all(isinstance(e, ServerRefused) for e in generated.errors):
            raise CauseError(f"{missing} prompts could not be answered by any server: {'; '.join(self.reasons)}")
        for reason in self.reasons:
            logger.warning("%s", reason)
        return generated.groups

    def wait_for_all(self) -> None:
        """Until all ranks are here, however long others generate. A rank that fails ends the others by itself."""
        self.meetings.wait(_GENERATION_S)

    def probe(
        self, prompts: Sequence[Prompt], params: SamplingParams, servers: Sequence[int]
    ) -> list[list[Group | None]]:
        """Responses of each of these servers by itself. Not collective."""
        addresses = list(self.served)
        answers = [self.pool.generate(prompts, params, version=self._version, only=addresses[i]) for i in servers]
        for error in (error for answer in answers for error in answer.errors):
            logger.warning("the probe of weight update %d: %s", self._version, error)
        return [answer.groups for answer in answers]

    def rest(self) -> None:
        """Give the servers' device memory to the trainer, with sglang.colocate."""
        if not self.config.colocate or self._resting:
            return

        async def release(client: ServerClient) -> None:
            await client.pause("abort")
            await client.flush_cache()
            self._released[client.address] = set(_MEMORY)  # also where the answer is late
            try:
                await client.release_memory(_MEMORY)
            except ServerRefused:
                del self._released[client.address]
                raise

        self._start_attempt()
        self._drive_each(release)
        self._resting = True
        self._agree()
        self._stop_if_failed("release the servers' memory")

    # -- the verbs of an update ---------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop all servers and empty their caches. Those that are lost are started again, or left out."""
        self._start_attempt()
        if self._is_driver:
            self._guard(self._call_roll)
        self._agree()
        self._stop_if_failed("bring back servers that were lost")
        self._share_addresses()
        self.turns.forget()
        self._drive(
            lambda c: c.pause("abort"), lambda c: c.flush_cache(), lambda c: self._give_memory_back(c, _MEMORY[:1])
        )
        if self._half_done:
            self._clean_up()
        self._agree()

    def begin_update(self, version: int) -> None:
        """Open the update at the servers."""
        self._attempts = self._attempts + 1 if version == self._next_version else 1
        self._next_version, self._plan = version, None
        if self.transport.needs_session:
            self._drive(lambda c: c.begin_update())
        self._agree()

    def update(self, bucket: GatheredBucket) -> None:
        """Send a bucket, if it is this rank's. Returns while it is on its way; the one before it has arrived."""
        if self._plan is None:
            self._plan = bucket.plan
            self._open_transport(bucket.plan)
        if bucket.bucket is None:
            return
        key = f"{self._epoch}/{bucket.bucket.feed}/{bucket.number}"
        self._wait_sent()
        if self._errors or self._failures or self._turn_lost:
            self.turns.end(key, failed=True)
            return
        # Gathered by now; put together only after the bucket before it has left, see ReshardPlan.peak_bytes.
        self._sending = self._sender.submit(self._send_in_turn, bucket.assemble(), bucket, key)

    def end_update(self, export: Export) -> bool:
        """Name the new weights and prove them. False: something failed, and the update must be made once more.

        `export` gathers the weights that are checked.

        Raises:
            CauseError: the update failed too often.
            UserError: a server's model is another one.
        """
        self._wait_sent()
        self._agree()
        if self._is_driver and not self._failures:
            assert self._plan is not None
            self._guard(self.transport.finish, self._plan)
        self._drive(lambda c: c.set_version(self._next_version))
        if self.transport.needs_session:
            self._drive(lambda c: c.end_update())
        self._agree()
        if not self._failures:
            self._check(export)
            self._agree()
        if not self._failures:
            return True
        self._give_up_or_go_on()
        return False

    def resume(self) -> None:
        """Let the servers generate with the new weights. One that is lost just now is missed by generation."""

        async def go_on(client: ServerClient) -> None:
            await self._give_memory_back(client, _MEMORY)
            await client.resume()

        self._drive_each(go_on)
        self._agree()
        self._stop_if_failed("let the servers go on")
        self._resting, self._half_done, self._attempts = False, False, 0
        self._version, self._updates = self._next_version, self._updates + 1
        for address in self.served:
            self.pool.mark_back(address)

    def close(self, *, failed: bool = False) -> None:
        """End what this rank has open. The servers are the manager's.

        After a failure no server is spoken to: it may hang, and the other ranks wait to hear of the failure.
        """
        self._sender.shutdown(wait=False, cancel_futures=True)
        if not failed:
            self._guard(self.transport.close)
        self.pool.close()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _open_transport(self, plan: ReshardPlan) -> None:
        """Every sender in turn: a server joins one group at a time."""
        feeds = self.roll.feeds
        senders = [(number, rank) for number in range(len(feeds)) for rank in plan.senders(number)]
        mine = next((f for f in feeds if self.groups.rank in f.ranks), None)
        if self._failures:
            return  # known to all: nobody joins
        if not any(rank == self.groups.rank for _, rank in senders):
            self._guard(lambda: self.transport.begin(self._next_version, mine, sends=False))
            return
        place = next(i for i, (_, rank) in enumerate(senders) if rank == self.groups.rank)
        key = f"{self._epoch}/join/{place}"
        try:
            if place > 0:
                self.turns.wait(f"{self._epoch}/join/{place - 1}")
            self.transport.begin(self._next_version, mine, sends=True)
            self.turns.end(key)
            self.turns.wait(f"{self._epoch}/join/{len(senders) - 1}")
        except TurnLost:
            self.turns.end(key, failed=True)
            self._turn_lost = True
        except (ServerError, RuntimeError, OSError, TimeoutError) as error:
            self.turns.end(key, failed=True)
            self._errors.append(error)

    def _send_in_turn(self, flat: FlatBucket, bucket: GatheredBucket, key: str) -> None:
        """In the sender's thread."""
        assert bucket.bucket is not None
        feed, number = bucket.bucket.feed, bucket.number
        try:
            if number > 0:
                before = next(b for b in bucket.plan.steps[number - 1].buckets if b.feed == feed)
                if before.sender != self.groups.rank:
                    self.turns.wait(f"{self._epoch}/{feed}/{number - 1}")
            self.transport.send(flat)
        except BaseException:
            self.turns.end(key, failed=True)
            raise
        self.turns.end(key)

    def _wait_sent(self) -> None:
        """Until the bucket that is on its way has arrived."""
        sending, self._sending = self._sending, None
        if sending is not None:
            self._guard(sending.result)

    # -- proof --------------------------------------------------------------------------------------------------------

    def _check(self, export: Export) -> None:
        """Compare checksums of the servers' parameters with those that the trainer's weights must have there."""
        chosen, skipped = self.weight_check.choose(self._updates, whole=self._half_done)
        if not chosen:
            return
        assert self._plan is not None
        # The servers work out theirs while the ranks work out what they must be.
        answering = self._sender.submit(self._on_all, lambda c: c.checksums(skipped)) if self._is_driver else None
        served = list(self.served.values())
        sums = ServerChecksums(chosen, served, self.num_experts)
        for bucket in export(self.weight_check.plan(self._plan, chosen)):
            sums.add(bucket)
        parts: list[Any] = [None] * self.groups.layout.world_size
        dist.all_gather_object(parts, sums.digests(), group=self.groups.world)
        if answering is None:
            return
        expected = {key: digest for part in parts for key, digest in part.items()}
        for server, answer in zip(served, answering.result(), strict=True):
            if isinstance(answer, ServerError):
                self._errors.append(answer)
                continue
            wrong = sums.differing(expected, server, answer)
            if wrong:
                said = f"{len(wrong)} of {len(chosen)} parameters are not the trainer's: {', '.join(wrong[:4])}"
                remedy = "if its kernels keep weights in another form, set sglang.check to off"
                self._errors.append(ServerRefused(server.address, "checksums", f"{said}; {remedy}"))

    # -- failures -----------------------------------------------------------------------------------------------------

    def _start_attempt(self) -> None:
        self._epoch += 1
        self._errors, self._failures, self._turn_lost = [], [], False

    def _guard(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run a step of this rank; what the outside world does to it is kept for `_agree`."""
        try:
            call(*arguments)
        except TurnLost:
            self._turn_lost = True  # the sender that failed says why
        except UserError:
            raise
        except (ServerError, RuntimeError, OSError, TimeoutError) as error:
            self._errors.append(error)

    def _drive(self, *calls: Callable[[ServerClient], Awaitable[Any]]) -> None:
        """Rank 0: make the calls on all servers, one after the other, unless something failed before."""
        for call in calls:
            if self._is_driver and not self._errors and not self._failures:
                self._errors += [r for r in self._on_all(call) if isinstance(r, ServerError)]

    def _drive_each(self, call: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Rank 0: make the call on all servers. One that is lost is no failure here: the next pause brings it back."""
        if not self._is_driver:
            return
        for answer in self._on_all(call):
            if isinstance(answer, ServerRefused):
                self._errors.append(answer)
            elif isinstance(answer, ServerError):
                logger.warning("%s", answer)

    async def _give_memory_back(self, client: ServerClient, kinds: Sequence[str]) -> None:
        """A server must not be told twice, nor one that has started since."""
        released = self._released.get(client.address, set())
        back = [kind for kind in kinds if kind in released]
        if back:
            await client.resume_memory(back)
            released.difference_update(back)

    def _on_all(self, call: Callable[[ServerClient], Awaitable[T]]) -> list[T | ServerError]:
        return self.pool.on_all(call)

    def _agree(self) -> None:
        """Make every rank know what went wrong on any. However long one needs for its servers, the others wait."""
        self.meetings.wait()
        parts: list[Any] = [None] * self.groups.layout.world_size
        mine = [(isinstance(e, ServerRefused), str(e) or type(e).__name__) for e in self._errors]
        gave_up = self._turn_lost or bool(self._failures)
        dist.all_gather_object(parts, (mine, gave_up), group=self.groups.world)
        said = [entry for errors, _ in parts for entry in errors]
        if said:
            self._failures = list(dict.fromkeys(text for _, text in said))
            self._refused = all(refused for refused, _ in said)
        elif any(gave_up for _, gave_up in parts):
            self._failures, self._refused = self._failures or ["a sender gave up"], False

    def _stop_if_failed(self, what: str) -> None:
        if self._failures:
            raise CauseError(f"could not {what}: {'; '.join(self._failures)}")

    def _give_up_or_go_on(self) -> None:
        """After a failed attempt: say so and let another one follow, or raise."""
        reasons = "; ".join(self._failures)
        update = f"weight update {self._next_version}"
        if self._refused and self._version < 0 and PARTLY_LOADED in reasons:
            raise UserError(
                f"{reasons}; the server's model has other shapes than model.path: start it with the same one"
            )
        if self._attempts > self.config.retries:
            raise CauseError(
                f"{update} failed {self._attempts} times; the servers stay paused and hold no usable weights: {reasons}"
            )
        if self._is_driver:
            logger.warning("%s failed and is tried again: %s", update, reasons)
        self._half_done = True

    def _clean_up(self) -> None:
        """Forget what an attempt left half done, here and at the servers. Those that are left answer: the lost ones
        have been replaced."""
        self._guard(self.transport.reset)
        if self._is_driver and self.transport.needs_session:
            self._on_all(lambda c: c.end_update())  # an open one would refuse the next; none may be open

    def _call_roll(self) -> None:
        """Rank 0: bring back the servers that are lost, or leave them out."""
        changed, restarted = self.roll.call(self.pool.names, self._version)
        self._half_done = self._half_done or bool(changed)  # a group with such a member is of no use
        for address in restarted:
            self._released.pop(address, None)

    def _share_addresses(self) -> None:
        """All ranks speak to the servers that rank 0 does, and know whether any of them is new."""
        shared: list[Any] = [(self.roll.addresses, self._half_done) if self._is_driver else None]
        dist.broadcast_object_list(shared, src=0, group=self.groups.world)
        addresses, self._half_done = shared[0]
        if addresses != self.roll.addresses:
            self.roll.take(addresses)


_GENERATION_S = 86_400.0  # of any head; one that fails, or is killed under a launcher, ends the others long before
_MEMORY = ("weights", "kv_cache", "cuda_graph")


def _use_device(device: torch.device) -> None:
    """A thread starts with the first CUDA device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
