"""All servers of a run, for a caller that blocks: generation spread over them, and control calls to each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import aiohttp

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.engine import SamplingParams
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
from gspo_megatron.rollout.sglang.client import ServerClient, open_session
from gspo_megatron.rollout.sglang.dispatch import Dispatch, Generated, Job, Member, Timing
from gspo_megatron.rollout.sglang.loop import LoopThread
from gspo_megatron.rollout.sglang.version import VersionNames
from gspo_megatron.types import Prompt
from gspo_megatron.weights.families.base import ModelFields

ABORT_EVERY_S = 0.2  # requests that were in front of the scheduler are reached by a later abort

T = TypeVar("T")


class ServerPool:
    """The servers of a run. Its methods block; each may be called from any thread, generate from one at a time."""

    def __init__(
        self,
        addresses: Sequence[ServerAddress],
        config: SGLangConfig,
        *,
        share: int = 1,
        first: int = 0,
        run: str = "",
        fields: ModelFields | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`share` pools use the same servers, each for its part of `max_concurrent` and preferring server `first`.

        `run`: see `VersionNames`. `fields` of the model let tokens and experts be checked; routed experts need them.
        """
        self._config, self._first, self._fields = config, first, fields
        self.names = VersionNames(run)
        self._limit = max(1, config.max_concurrent // share)
        self._timing = timing or Timing()
        self._dispatch: Dispatch | None = None
        self._members: list[Member] = []
        self._router: Member | None = None
        self.loop = LoopThread()
        self._session = self.loop.run(self._open(addresses))

    async def _open(self, addresses: Sequence[ServerAddress]) -> aiohttp.ClientSession:
        self._session = open_session()
        self._members = [Member(self._client(address)) for address in addresses]
        if self._config.router:
            # The router's key is that of its workers.
            key = addresses[0].api_key if addresses else None
            address = ServerAddress(self._config.router.rstrip("/"), key)
            self._router = Member(self._client(address), is_router=True)
        return self._session

    def _client(self, address: ServerAddress) -> ServerClient:
        return ServerClient(
            address,
            self._session,
            request_timeout_s=self._config.request_timeout_s,
            update_timeout_s=self._config.update_timeout_s,
            names=self.names,
        )

    @property
    def clients(self) -> list[ServerClient]:
        """One a server, in the addresses' order."""
        return [member.client for member in self._members]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        version: int,
        routed_experts: bool = False,
        only: ServerAddress | None = None,
    ) -> Generated:
        """`num_samples` responses to each prompt by weights of `version`, or None and the reasons.

        A prompt whose server fails goes to another one; nothing of a failed request is kept. A server that failed gets
        no further request, unless none is left and it is well again.

        Raises:
            ServerRefused: a server says that a request is wrong.
            UserError: a prompt holds tokens that the model does not have; a server has the weights of another run.
        """
        self._check_tokens(prompts)
        job = Job(prompts, params, version, self._fields, routed_experts)
        return self.loop.run(self._generate(job, only))

    async def _generate(self, job: Job, only: ServerAddress | None) -> Generated:
        assert self._dispatch is None, "generate is running"
        # The router spreads requests over its workers itself.
        members = [self._router] if self._router and only is None else self._members
        if only is not None:
            members = [member for member in members if member.address == only]
        limit = self._limit * (len(self._members) if members == [self._router] else 1)
        self._dispatch = Dispatch(members, job, limit=limit, first=self._first, timing=self._timing)
        try:
            return await self._dispatch.run()
        finally:
            self._dispatch = None

    def _check_tokens(self, prompts: Sequence[Prompt]) -> None:
        if self._fields is None:
            return
        vocab_size = self._fields.vocab_size
        for prompt in prompts:
            # A server does not check them, and does not survive them.
            foreign = [token for token in prompt.token_ids if not 0 <= token < vocab_size]
            if foreign:
                raise UserError(
                    f"prompt {prompt.id} holds token {foreign[0]}, and the model's vocabulary has {vocab_size}; "
                    "use the tokenizer that belongs to model.path"
                )

    def abort(self) -> None:
        """End a running `generate`: open requests return what they have, with finish reason "abort"."""
        self.loop.run(self._abort())

    async def _abort(self) -> None:
        dispatch = self._dispatch
        if dispatch is None:
            return
        dispatch.abort()
        while not dispatch.ended.is_set():
            # Behind a router it is not known who has the requests.
            busy = self._members if self._router else dispatch.busy()
            await asyncio.gather(*(_result(member.client.abort_all()) for member in busy))
            try:
                await asyncio.wait_for(dispatch.ended.wait(), ABORT_EVERY_S)
            except TimeoutError:
                pass

    def mark_back(self, address: ServerAddress) -> None:
        """A server is well again: let it take part, also in a call that runs."""
        self.loop.run(self._mark_back(address))

    async def _mark_back(self, address: ServerAddress) -> None:
        for member in self._members:
            if member.address == address:
                member.suspect = member.client.paused = False
                if self._dispatch and not self._router:
                    self._dispatch.bring_back(member)

    def set_addresses(self, addresses: Sequence[ServerAddress]) -> None:
        """Replace the servers, also in a call that runs. Those that stay keep their state."""
        self.loop.run(self._set_addresses(addresses))

    async def _set_addresses(self, addresses: Sequence[ServerAddress]) -> None:
        known = {member.address: member for member in self._members}
        self._members = [known.get(address) or Member(self._client(address)) for address in addresses]
        if self._dispatch and not self._router:
            for address, member in known.items():
                if address not in addresses:
                    self._dispatch.leave_out(member)
            for member in self._members:
                if member.address not in known:
                    self._dispatch.bring_back(member)

    def on_all(self, call: Callable[[ServerClient], Awaitable[T]]) -> list[T | ServerError]:
        """One call on all servers at the same time: their results, or what each failed with, in order."""
        return self.loop.run(self._on_all(call))

    async def _on_all(self, call: Callable[[ServerClient], Awaitable[T]]) -> list[T | ServerError]:
        return list(await asyncio.gather(*(_result(call(member.client)) for member in self._members)))

    def close(self) -> None:
        """End what runs and close the connections. A second call does nothing."""
        if not self._session.closed:
            self.loop.run(self._session.close())
            self.loop.close()


async def _result(call: Awaitable[T]) -> T | ServerError:
    try:
        return await call
    except ServerError as error:
        return error
