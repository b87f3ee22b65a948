"""One call of generate over several servers: who gets which prompt, and what happens when a server fails.

All of it runs in one event loop, so that nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError, ServerRefused, ServerUnavailable
from gspo_megatron.rollout.sglang.client import ServerClient
from gspo_megatron.rollout.sglang.generation import BadAnswer, WrongVersion, request_of, rollouts_of
from gspo_megatron.rollout.sglang.version import OtherRun
from gspo_megatron.types import Group, Prompt
from gspo_megatron.weights.families.base import ModelFields

MOST_ATTEMPTS = 3  # failed requests of one prompt: it may be the prompt that ends the servers
MOST_RETURNS = 2  # times in one call that a server which failed takes part again


@dataclass(frozen=True)
class Timing:
    """How servers are watched."""

    probe_every_s: float = 5.0  # a server with open requests is asked whether it is alive
    probe_timeout_s: float = 10.0  # without an answer to two probes in a row its requests are given up
    backoff_s: float = 1.0  # before a failed server is asked whether it is well again; doubles


@dataclass
class Member:
    """A server that takes part in generation."""

    client: ServerClient
    is_router: bool = False
    suspect: bool = False  # it failed in an earlier call and is asked first whether it is well again

    @property
    def address(self) -> ServerAddress:
        return self.client.address

    async def check(self, timeout_s: float) -> None:
        """Return if the server generates; one that is paused, if it answers.

        Raises:
            ServerUnavailable: it does not.
        """
        # What a router's workers are up to shows in the requests; whatever it answers, it is there.
        check = self.client.model_info if self.client.paused or self.is_router else self.client.health_generate
        try:
            await check(timeout_s)
        except ServerRefused:
            pass  # it answers; what it refuses shows in the requests


@dataclass(frozen=True)
class Job:
    """What one call asks for."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    version: int  # of the weights the responses must come from
    fields: ModelFields | None  # of the model, if known
    routed_experts: bool


@dataclass(frozen=True)
class Generated:
    """What came of one call."""

    groups: list[Group | None]  # in the prompts' order; None where no server could do it, or where it was aborted
    errors: list[ServerError]  # each kind of failure of each server once, also of those that others made up for


@dataclass
class _State:
    """A member during one call."""

    member: Member
    position: int
    here: bool = True  # gets requests
    final: bool = False  # does not take part again
    returns: int = 0
    open: dict[asyncio.Task[Group], int] = field(default_factory=dict)  # its requests -> prompt


class Dispatch:
    """One call. Each prompt is one request for all its samples, so that they arrive together or not at all."""

    def __init__(self, members: Sequence[Member], job: Job, *, limit: int, first: int, timing: Timing) -> None:
        self._job, self._limit, self._first, self._timing = job, limit, first, timing
        self._states = [_State(member, i) for i, member in enumerate(members)]
        self._waiting = deque(range(len(job.prompts)))
        self._groups: list[Group | None] = [None] * len(job.prompts)
        self._attempts = [0] * len(job.prompts)
        self._errors: dict[tuple[str, str], ServerError] = {}
        self._checks: set[asyncio.Task[None]] = set()  # of servers that may come back
        self._watchers: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self.aborting = False
        self.ended = asyncio.Event()

    async def run(self) -> Generated:
        """Generate.

        Raises:
            ServerRefused: a server says that a request is wrong.
            UserError: a server has the weights of another run.
        """
        try:
            for state in self._states:
                self._join(state)
            self._step()
            while self._open or (self._waiting and self._checks):
                (await self._events.get())()
                self._step()
            return Generated(self._groups, list(self._errors.values()))
        finally:
            self.ended.set()
            tasks: list[asyncio.Task[Any]] = [*self._checks, *self._watchers]
            for state in self._states:
                tasks += state.open
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def abort(self) -> None:
        """Send no further request; those that are open keep what their server has when it is told to abort."""
        self.aborting = True
        self._waiting.clear()
        for task in self._checks:
            task.cancel()
        self._events.put_nowait(lambda: None)

    def busy(self) -> list[Member]:
        """Members with open requests."""
        return [state.member for state in self._states if state.open]

    def bring_back(self, member: Member) -> None:
        """Let a member take part, a new one or one that had failed."""
        state = next((s for s in self._states if s.member is member), None)
        if state is None:
            state = _State(member, len(self._states))
            self._states.append(state)
            self._join(state)
        state.here, state.final = True, False
        self._events.put_nowait(lambda: None)

    def leave_out(self, member: Member) -> None:
        """Give up a member and its open requests."""
        for state in self._states:
            if state.member is member:
                self._give_up(state, ServerUnavailable(member.address, "/generate", "taken out"), final=True)
        self._events.put_nowait(lambda: None)

    @property
    def _open(self) -> int:
        return sum(len(state.open) for state in self._states)

    def _join(self, state: _State) -> None:
        self._watchers.append(asyncio.create_task(self._watch(state)))
        if state.member.suspect:
            state.here = False
            self._check(state, wait_s=0.0)

    def _step(self) -> None:
        """Send what can be sent; with nobody to send it to, see who comes back."""
        while self._waiting and (state := self._least_loaded()) is not None:
            self._send(state, self._waiting.popleft())
        if self._waiting and not self._checks and not any(state.here for state in self._states):
            for state in self._states:
                if not state.final and state.returns < MOST_RETURNS:
                    state.returns += 1
                    self._check(state, wait_s=self._timing.backoff_s * 2 ** (state.returns - 1))

    def _least_loaded(self) -> _State | None:
        """The member with the fewest open responses, if one has room; a group larger than that goes to an idle one."""
        room = [s for s in self._states if s.here and (not s.open or self._num_responses(s, 1) <= self._limit)]
        shifted = len(self._states)
        return min(room, key=lambda s: (len(s.open), (s.position - self._first) % shifted), default=None)

    def _num_responses(self, state: _State, further: int) -> int:
        return (len(state.open) + further) * self._job.params.num_samples

    def _send(self, state: _State, index: int) -> None:
        task = asyncio.create_task(self._request(state.member.client, self._job.prompts[index]))
        state.open[task] = index
        task.add_done_callback(lambda done: self._events.put_nowait(lambda: self._receive(state, done)))

    async def _request(self, client: ServerClient, prompt: Prompt) -> Group:
        job = self._job
        answers = await client.generate(request_of(prompt, job.params, job.routed_experts))
        try:
            rollouts = rollouts_of(
                prompt, answers, job.params, job.version,
                names=client.names, fields=job.fields, routed_experts=job.routed_experts,
            )  # fmt: skip
        except OtherRun as error:
            raise UserError(f"{client.address.url}: {error}") from error
        if not self.aborting and any(rollout.finish_reason == "abort" for rollout in rollouts):
            raise ServerUnavailable(client.address, "/generate", "somebody else aborted the request")
        return Group(prompt, rollouts)

    def _receive(self, state: _State, task: asyncio.Task[Group]) -> None:
        index = state.open.pop(task, None)
        if index is None:
            return  # given up before: the prompt is on its way again
        if task.cancelled():
            self._again(index)
            return
        error = task.exception()
        if error is None:
            assert self._groups[index] is None, "a prompt was answered twice"
            self._groups[index] = task.result()
            state.member.suspect = False
        elif isinstance(error, BadAnswer):
            # Not trained on; another server may be sound. This one is too when it gets the weights that it lacks.
            kind = ServerUnavailable if isinstance(error, WrongVersion) else ServerRefused
            self._give_up(state, kind(state.member.address, "/generate", str(error)), final=True, close=False)
            self._again(index)
        elif isinstance(error, ServerUnavailable):
            self._give_up(state, error, close=False)
            self._again(index)
        else:
            raise error  # a request that is wrong for every server, or a bug

    def _again(self, index: int) -> None:
        """A prompt whose request failed waits for another server, before those that were never sent."""
        self._attempts[index] += 1
        if self._attempts[index] < MOST_ATTEMPTS and not self.aborting:
            self._waiting.appendleft(index)

    def _give_up(self, state: _State, error: ServerError, *, final: bool = False, close: bool = True) -> None:
        """Send a member nothing more; with `close`, also drop the requests it has."""
        if state.here:  # else it is known
            self._errors.setdefault((error.address.url, error.reason), error)
        state.here = False
        state.final = state.final or final
        # Of one whose answers are wrong its health says nothing.
        state.member.suspect = isinstance(error, ServerUnavailable) and not final
        if close:
            for task, index in list(state.open.items()):
                del state.open[task]
                task.cancel()  # the server sees a closed connection and stops generating
                self._again(index)

    def _check(self, state: _State, *, wait_s: float) -> None:
        task = asyncio.create_task(self._come_back(state, wait_s))
        self._checks.add(task)

        def done() -> None:
            self._checks.discard(task)

        task.add_done_callback(lambda _: self._events.put_nowait(done))

    async def _come_back(self, state: _State, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        try:
            await state.member.check(self._timing.probe_timeout_s)
        except ServerUnavailable as error:
            self._errors.setdefault((error.address.url, error.reason), error)
        else:
            state.here = not state.final

    async def _watch(self, state: _State) -> None:
        """Give up a server that has open requests and does not answer two probes in a row."""
        missed = 0
        while True:
            await asyncio.sleep(self._timing.probe_every_s)
            if not state.open:
                missed = 0
                continue
            try:
                await state.member.check(self._timing.probe_timeout_s)
                missed = 0
            except ServerUnavailable as error:
                missed += 1
                if missed == 2 and state.open:
                    self._give_up(state, error)
                    self._events.put_nowait(lambda: None)
