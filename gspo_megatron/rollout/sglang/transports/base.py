"""What a transport is, and the order in which ranks send."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.weights.gather import FlatBucket
from gspo_megatron.weights.reshard import ReshardPlan


@dataclass(frozen=True)
class Feed:
    """Servers that are sent the same buckets, and the ranks that may send them."""

    ranks: tuple[int, ...]
    servers: tuple[ServerAddress, ...]


class Transport(Protocol):
    """One way of the weights to the servers. An update is begin, send for each bucket, finish; on every rank.

    All methods raise ServerError or RuntimeError, within `sglang.update_timeout_s` a call.
    """

    needs_session: bool  # buckets go in between /begin_weight_update and /end_weight_update

    def begin(self, version: int, feed: Feed | None, *, sends: bool) -> None:
        """Get ready. `feed` None: this rank belongs to none; `sends`: it will call `send`."""
        ...

    def send(self, bucket: FlatBucket) -> None:
        """Bring one bucket into all servers of the feed. Called in a thread of its own, in the plan's order."""
        ...

    def finish(self, plan: ReshardPlan) -> None:
        """Called at rank 0 when all ranks have sent everything."""
        ...

    def reset(self) -> None:
        """Give up what a failed update may have left half done."""
        ...

    def close(self) -> None:
        """At the end of the run."""
        ...


class TurnLost(RuntimeError):
    """An earlier sender of this update failed, so this one doesn't send."""


class Turns:
    """Whose turn it is, over all ranks: a server takes one bucket at a time, and two servers that took two senders'
    buckets in different order would wait for each other for ever."""

    def __init__(self, store: dist.Store, timeout_s: float) -> None:
        self._store, self._timeout = store, timedelta(seconds=timeout_s)
        self._ended: list[str] = []

    def wait(self, key: str) -> None:
        """Return when the turn `key` is over.

        Raises:
            TurnLost: it ended with an error.
            RuntimeError: it did not end in time.
        """
        try:
            self._store.wait([key], self._timeout)
        except dist.DistStoreError as error:
            raise RuntimeError(f"no sender had its turn within {self._timeout.total_seconds():g} s") from error
        if self._store.get(key) != b"done":
            raise TurnLost("an earlier sender of this update failed")

    def end(self, key: str, *, failed: bool = False) -> None:
        """Let the next one send, or tell it not to."""
        self._store.set(key, "failed" if failed else "done")
        self._ended.append(key)

    def forget(self) -> None:
        """Let go of this rank's turns so far. No rank may wait for them any more."""
        ended, self._ended = self._ended, []
        for key in ended:
            self._store.delete_key(key)


class Meetings:
    """Where all ranks wait for each other longer than a collective would: rank 0 may start servers meanwhile."""

    def __init__(self, store: dist.Store, world_size: int, timeout_s: float) -> None:
        self._store, self._world_size, self._timeout = store, world_size, timedelta(seconds=timeout_s)
        self._number = 0

    def wait(self, timeout_s: float = 0.0) -> None:
        """Return when all ranks have called it as often as this one, within `timeout_s` if that is longer than usual.

        Raises:
            RuntimeError: one did not in time.
        """
        self._number += 1
        here, all_here = f"here/{self._number}", f"all/{self._number}"
        if self._store.add(here, 1) == self._world_size:
            self._store.set(all_here, "1")
            if self._number > 1:  # all have left the meeting before
                for name in ("here", "all"):
                    self._store.delete_key(f"{name}/{self._number - 1}")
        timeout = max(self._timeout, timedelta(seconds=timeout_s))
        try:
            self._store.wait([all_here], timeout)
        except dist.DistStoreError as error:
            seconds = timeout.total_seconds()
            raise RuntimeError(f"a rank was not done with its servers within {seconds:g} s") from error
