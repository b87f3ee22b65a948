"""Which servers take part, from one weight update to the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError, ServerRefused
from gspo_megatron.rollout.sglang.client import INFO_TIMEOUT_S, ServerClient
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.served_model import ServedModel, read_served_model
from gspo_megatron.rollout.sglang.transports.base import Feed
from gspo_megatron.rollout.sglang.version import NEVER_SET, OtherRun, VersionNames

logger = logging.getLogger(__name__)

_LEFT_OUT_S = 3.0  # that one which is left out has for its answer: it may be gone for good
_ASK_EVERY_S = 1.0


class RollCall:
    """The servers of a run, and those of them that take part.

    Servers that this run has started are started again when they are lost. Those of others are left out, and take part
    again as soon as they answer: `serve` starts its own again. Where none is left, one is waited for.
    """

    def __init__(
        self,
        config: SGLangConfig,
        pool: ServerPool,
        served: Sequence[ServedModel],
        feeds: Sequence[Feed],
        manager: ServerManager | None,
    ) -> None:
        """`manager` at rank 0, of servers that it may restart."""
        self._config, self._pool, self._manager = config, pool, manager
        self._all = {s.address: s for s in served}
        self._all_feeds = list(feeds)
        self.served = dict(self._all)

    @property
    def addresses(self) -> list[ServerAddress]:
        """Of the servers that take part."""
        return list(self.served)

    @property
    def feeds(self) -> list[Feed]:
        """With the servers that take part alone."""
        return [Feed(f.ranks, tuple(a for a in f.servers if a in self.served)) for f in self._all_feeds]

    def call(self, names: VersionNames, version: int) -> tuple[set[ServerAddress], set[ServerAddress]]:
        """Ask all servers and decide who takes part. For rank 0; the others `take` its `addresses`.

        Args:
            names: of this run's weights.
            version: of the weights that they were left with; below 0: none yet.

        Returns:
            the servers that have come, gone, or have other weights than they were left with; and of these the ones that
            were started again.

        Raises:
            CauseError: no server is left, or one can't be started again.
            UserError: another run has sent weights to a server since.
        """
        answers = self._ask(version)
        lost = [address for address, answer in answers.items() if isinstance(answer, ServerError)]
        if lost and self._manager is not None:
            self._restart(lost, _reasons(answers))
            return set(lost), set(lost)
        if len(lost) == len(answers):
            answers = self._wait_for_one(answers, version)
        # Another name than they were left with: started again in between, or named by an update that failed later.
        changed = {
            address
            for address, answer in answers.items()
            if not isinstance(answer, ServerError)
            and (address not in self.served or (version >= 0 and _number(names, address, answer) != version))
        }
        before, left = self.addresses, [a for a in answers if not isinstance(answers[a], ServerError)]
        if left != before:
            back = [a.url for a in left if a not in before]
            said = f"; back: {', '.join(back)}" if back else ""
            reasons = _reasons(answers)
            logger.warning(
                "going on with %d of %d servers%s%s", len(left), len(answers), said, reasons and f": {reasons}"
            )
        self.take(left)
        restarted = {address for address in changed if answers[address] == NEVER_SET}
        return changed | (set(before) - set(left)), restarted

    def take(self, addresses: Sequence[ServerAddress]) -> None:
        """Let these servers take part and no others."""
        self.served = {a: self._all[a] for a in addresses}
        self._pool.set_addresses(addresses)

    def _ask(self, version: int) -> dict[ServerAddress, str | ServerError]:
        """What each server calls its weights, or why it can't take part."""
        everyone = list(self._all)
        if everyone != [client.address for client in self._pool.clients]:
            self._pool.set_addresses(everyone)

        async def ask(client: ServerClient) -> str:
            known = client.address in self.served
            limit_s = min(INFO_TIMEOUT_S, self._config.update_timeout_s) if known else _LEFT_OUT_S
            try:
                server = await client.server_info(limit_s)  # asks the server's scheduler
            except ServerError:
                client.paused = False  # whoever comes back at this address is another one
                raise
            model = await client.model_info(limit_s)
            name = str(model.get("weight_version"))
            if name == NEVER_SET and version >= 0:
                self._check_same(client.address, model, server)
                if not client.paused:  # it may be about to generate its first token, for `serve` to see that it does
                    await client.health_generate(limit_s)
            return name

        return dict(zip(everyone, self._pool.on_all(ask), strict=True))

    def _check_same(self, address: ServerAddress, model: dict[str, Any], server: dict[str, Any]) -> None:
        """Raise ServerRefused where a server was started again as another one than it was."""
        was = self._all[address]
        try:
            now = read_served_model(address, model, server)
        except UserError as error:
            raise ServerRefused(address, "/server_info", str(error)) from error
        if (now.layout, now.dtype, now.on_gpu) != (was.layout, was.dtype, was.on_gpu):
            said = " instead of ".join(f"TP{one.layout.tensor} in {one.dtype}" for one in (now, was))
            raise ServerRefused(address, "/server_info", f"it was started again with {said}")

    def _restart(self, lost: Sequence[ServerAddress], reasons: str) -> None:
        assert self._manager is not None
        logger.warning("%d of %d servers are lost and are started again: %s", len(lost), len(self._all), reasons)
        indices = [index for index, address in enumerate(self._all) if address in lost]
        with ThreadPoolExecutor(len(indices)) as starting:
            list(starting.map(self._manager.restart, indices))

    def _wait_for_one(
        self, answers: dict[ServerAddress, str | ServerError], version: int
    ) -> dict[ServerAddress, str | ServerError]:
        limit_s = self._config.start_timeout_s
        reasons = _reasons(answers)
        logger.warning("no server answers; one is waited for, sglang.start_timeout_s=%g s long: %s", limit_s, reasons)
        deadline = time.monotonic() + limit_s
        while all(isinstance(answer, ServerError) for answer in answers.values()):
            if time.monotonic() > deadline:
                raise CauseError(f"no server is left, and none came back within {limit_s:g} s: {_reasons(answers)}")
            time.sleep(_ASK_EVERY_S)
            answers = self._ask(version)
        return answers


def _reasons(answers: dict[ServerAddress, str | ServerError]) -> str:
    return "; ".join(str(answer) for answer in answers.values() if isinstance(answer, ServerError))


def _number(names: VersionNames, address: ServerAddress, name: str) -> int:
    try:
        return names.number(name)
    except OtherRun as error:
        raise UserError(f"{address.url}: {error}") from error
    except ValueError:
        return -1
