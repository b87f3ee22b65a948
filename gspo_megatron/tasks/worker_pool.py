"""Worker processes that call a reward function and can be killed.

multiprocessing's own pools cannot stop a call that hangs, and its spawned children import the parent's
__main__, which would bring torch and Megatron into every worker. These workers run reward_worker.py as a
plain script and talk over one pipe each.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from gspo_megatron import stop
from gspo_megatron.errors import UserError

STARTUP_TIMEOUT_S = 180.0  # for importing the function's module
_SCRIPT = Path(__file__).with_name("reward_worker.py")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Outcome:
    """What became of one call: a value, or None and the reason."""

    value: float | None
    reason: str | None = None
    timed_out: bool = False


class _Worker:
    """One process: starting, idle (item is None) or busy with an item."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.connection, child = Pipe()
        with child:
            # -P: the script's folder must not be on sys.path, its files are named like packages.
            # A session of its own: what the function starts is killed with it, and Ctrl-C is the trainer's.
            with stop.blocked():  # until the script is ready: what asks the trainer to stop is not for its workers
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(_SCRIPT), str(child.fileno())],
                    pass_fds=[child.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        self.connection.send(setup)
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + STARTUP_TIMEOUT_S

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def kill(self) -> int:
        """End the process and all it started; returns its exit code."""
        self.connection.close()
        # The process is not reaped yet, so its group's id cannot have been given to another.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class WorkerPool:
    """Calls function(response_text, reference, **arguments) in processes that share nothing with this one."""

    def __init__(
        self,
        target: str,
        *,
        num_workers: int,
        timeout_s: float,
        arguments: Mapping[str, Any] | None = None,
        setting: str = "task.reward",
    ) -> None:
        """Start the workers and wait until they have imported the function.

        Args:
            target: "module:function"; the module is looked for in the current folder first.
            timeout_s: a call that takes longer is given up and its worker replaced.
            setting: what messages call the target.

        Raises:
            UserError: a malformed target, or a function that cannot be imported or called with two arguments.
        """
        self._name = f"{setting}={target!r}"
        if not _TARGET.fullmatch(target):
            raise UserError(f'{self._name} must be "module:function", e.g. "my_rewards:score"')
        folder = str(Path.cwd())
        package_root = str(Path(__file__).parents[2])
        paths = [folder, *(path or folder for path in sys.path), package_root]
        self._folder = folder
        self._setup = {
            "sys_path": list(dict.fromkeys(paths)),
            "target": target,
            "arguments": dict(arguments or {}),
            "timeout_s": timeout_s,
        }
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(self._setup))
            while not all(worker.ready for worker in self._workers):
                self._wait([])
        except BaseException:
            self.close()
            raise

    def map(self, items: Sequence[tuple[str, Any]]) -> list[Outcome]:
        """The outcome of each (response_text, reference), in order. A call that fails or hangs is not repeated.

        Raises:
            UserError: a replaced worker can no longer import the function.
        """
        assert self._workers, "the pool is closed"
        outcomes: list[Outcome | None] = [None] * len(items)
        pending = deque(range(len(items)))
        try:
            while pending or any(worker.item is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.idle:
                        self._assign(worker, pending, items, outcomes)
                if any(not worker.idle for worker in self._workers):
                    self._wait(outcomes)
        except BaseException:
            self.close()  # no worker may answer a later call with this one's result
            raise
        return [_some(outcome) for outcome in outcomes]

    def close(self) -> None:
        """End all workers. The pool cannot be used afterwards; closing twice is fine."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _assign(
        self,
        worker: _Worker,
        pending: deque[int],
        items: Sequence[tuple[str, Any]],
        outcomes: list[Outcome | None],
    ) -> None:
        """Give an idle worker the next item; one that cannot be sent has failed."""
        while pending:
            item = pending.popleft()
            try:
                message = pickle.dumps(items[item])
            except Exception as error:  # the reference's own classes decide what pickling raises
                outcomes[item] = Outcome(None, f"the reference cannot be sent to a worker: {error}")
                continue
            worker.item = item
            worker.deadline = time.monotonic() + self._timeout_s
            # A worker that died while idle: the answer that never comes is noticed in _wait.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send_bytes(message)
            return

    def _wait(self, outcomes: list[Outcome | None]) -> None:
        """Wait until a worker answers, dies or passes its deadline, and handle every one that has."""
        active = [worker for worker in self._workers if not worker.idle]
        timeout_s = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        answered = wait([worker.connection for worker in active], timeout_s)
        now = time.monotonic()
        for worker in active:
            if worker.connection in answered:
                self._handle_answer(worker, outcomes)
            elif now >= worker.deadline:
                self._handle_timeout(worker, outcomes)

    def _handle_answer(self, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        try:
            kind, payload = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            item = worker.item
            code = self._replace(worker, restart=item is not None)
            if item is None:
                raise UserError(f"{self._name}: its process ended with code {code} while importing it") from None
            outcomes[item] = Outcome(None, f"the function ended its process with code {code}")
            return
        if kind == "invalid":
            raise UserError(f"{self._name}: {payload} (looked in {self._folder} and the Python path)")
        if kind == "ready":
            worker.ready = True
            return
        assert worker.item is not None, (kind, payload)
        outcomes[worker.item] = Outcome(payload) if kind == "value" else Outcome(None, payload)
        worker.item = None

    def _handle_timeout(self, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        if worker.item is None:
            raise UserError(
                f"{self._name}: importing it takes longer than {STARTUP_TIMEOUT_S:g} s; "
                "move slow work from the module's top level into the function"
            )
        outcomes[worker.item] = Outcome(None, f"scoring took longer than {self._timeout_s:g} s", timed_out=True)
        self._replace(worker, restart=True)

    def _replace(self, worker: _Worker, *, restart: bool) -> int:
        """Kill a worker and, to go on, start another in its place; returns the exit code."""
        code = worker.kill()
        index = self._workers.index(worker)
        if restart:
            self._workers[index] = _Worker(self._setup)
        return code


def _some(outcome: Outcome | None) -> Outcome:
    assert outcome is not None
    return outcome
