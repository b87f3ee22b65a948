"""When one rank fails, all ranks end, and the first error is the one that is shown.

A rank that raises leaves its peers blocked in a collective, where they would sit until the collective timeout and
then all report errors that are only consequences. Here the rank that fails first records its error on a board, a
small key-value store; a thread in every rank watches the board and ends the process however deep it is blocked.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from gspo_megatron.errors import CauseError, UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on a signal after saving; to be resumed

# Words of errors that a healthy rank raises because another rank failed. Taking a cause for a consequence only
# delays its report by the grace period, so the list is generous.
_CONSEQUENCE_WORDS = (
    "gloo", "nccl", "connection", "closed by peer", "reset by peer", "broken pipe", "socket", "timed out", "timeout",
    "process group", "processgroup", "tcpstore", "rendezvous", "barrier",
)  # fmt: skip
_TIMEOUT_WORDS = ("timed out", "timeout")
_LEAVE_TIMEOUT_S = 60.0  # a rank that was killed never leaves


@dataclass(frozen=True)
class Failure:
    """The error that ends a run."""

    rank: int
    time_s: float  # since the epoch
    type_name: str
    message: str
    traceback: str
    exit_code: int
    consequence: bool  # looks like the effect of another rank's failure, but no rank recorded a cause


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _mentions(error: BaseException, words: tuple[str, ...]) -> bool:
    return any(word in str(link).lower() for link in _chain(error) for word in words)


def is_consequence(error: BaseException) -> bool:
    """Whether the error may be the effect of another rank's failure."""
    if isinstance(error, UserError | CauseError):
        return False
    return isinstance(error, dist.DistError | ConnectionError | TimeoutError) or (
        isinstance(error, RuntimeError) and _mentions(error, _CONSEQUENCE_WORDS)
    )


class FailureBoard:
    """Where the first failing rank leaves its error. The first writer wins.

    Args:
        store: reachable from every rank for as long as one runs. The launcher's store outlives all ranks; without
            one, rank 0 hosts it.
        poll_s: how often a rank looks.
        grace_s: how long an error that looks like a consequence waits for its cause to be recorded.
        hosted_here: this rank's process holds the store, and must not end before the others have looked.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        poll_s: float = 0.25,
        grace_s: float = 5.0,
        hosted_here: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.poll_s = poll_s
        self.grace_s = grace_s
        self.hosted_here = hosted_here
        self._store = store
        self._stopped = threading.Event()
        self._raised = threading.Event()  # this rank has an error of its own
        self._watcher: threading.Thread | None = None

    @classmethod
    def from_environment(cls) -> FailureBoard:
        """The board of a rank started by torchrun, by SLURM or by this package.

        Uses the launcher's own store where there is one (torchrun; it outlives every rank), else a store at
        MASTER_ADDR:MASTER_PORT in rank 0, the same that `init_process_group` will share.
        """
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if world_size == 1:
            return cls(dist.HashStore(), rank, world_size)
        hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=hosts,
            timeout=timedelta(seconds=300),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # A restarted group of workers meets the same store: it must not find the last attempt's failure.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"failures/{attempt}", store), rank, world_size, hosted_here=hosts)

    # -- the record ---------------------------------------------------------------------------------------------------

    def first(self) -> Failure | None:
        """The recorded failure, if there is one."""
        if not self._store.check(["first"]):
            return None
        return Failure(**json.loads(self._store.get("first")))

    def record(self, error: BaseException) -> Failure:
        """Record this rank's error unless another was first; returns the one that counts.

        A consequence waits up to `grace_s` for its cause.
        """
        self._raised.set()
        consequence = is_consequence(error)
        if consequence:
            self._store.set(f"raised/{self.rank}", "1")
            self._wait_for("first", self.grace_s)
        failure = Failure(
            rank=self.rank,
            time_s=time.time(),
            type_name=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            exit_code=EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED,
            consequence=consequence,
        )
        return Failure(**json.loads(self._store.compare_set("first", "", json.dumps(asdict(failure)))))

    def _wait_for(self, key: str, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(self.poll_s / 5)
        return True

    # -- the report ---------------------------------------------------------------------------------------------------

    def report(self, failure: Failure, error: BaseException) -> None:
        """Print this rank's own failure, once for the whole job, and let the others end."""
        if failure.exit_code == EXIT_USER_ERROR:
            text = f"error: {failure.message}\n"
        else:
            headline = (failure.message.splitlines() or [""])[0]  # the traceback ends with the whole of it
            text = f"rank {failure.rank} of {self.world_size} failed first: {failure.type_name}: {headline}\n"
            text += "".join(self._silent_ranks(error)) if failure.consequence else ""
            text += failure.traceback
        print_error(text)
        self._store.set("printed", "1")

    def _silent_ranks(self, error: BaseException) -> Iterator[str]:
        """Ranks without an error while others wait for them: one of them hangs. Says where each is."""
        silent = [r for r in range(self.world_size) if r != self.rank and not self._store.check([f"raised/{r}"])]
        if not silent:
            return
        what = "a collective timed out" if _mentions(error, _TIMEOUT_WORDS) else "a collective failed"
        names = ", ".join(str(rank) for rank in silent)
        yield (
            f"{what}, and no error came from rank {names}: the cause is probably there. If the work is only slow, "
            "raise parallel.timeout_s.\n"
        )
        deadline = time.monotonic() + 4 * self.poll_s + 1
        for rank in silent:
            if self._wait_for(f"stack/{rank}", max(0.0, deadline - time.monotonic())):
                yield f"rank {rank} was at:\n{self._store.get(f'stack/{rank}').decode()}"
            else:
                yield f"rank {rank} did not answer: it ended, or is stuck outside Python\n"

    # -- the watcher --------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Start the thread that ends this process when another rank's failure is recorded."""
        main_thread = threading.get_ident()
        self._watcher = threading.Thread(target=self._watch, args=(main_thread,), name="failure-board", daemon=True)
        self._watcher.start()

    def _watch(self, main_thread: int) -> None:
        while not self._stopped.wait(self.poll_s):
            try:
                failure = self.first()
            except (RuntimeError, ConnectionError) as error:
                if not self._stopped.is_set():
                    headline = (str(error).splitlines() or [""])[0]
                    print_error(
                        f"rank {self.rank} of {self.world_size} ends: rank 0 or the launcher is gone: {headline}\n"
                    )
                    end_process(EXIT_FAILED)
                return
            if failure is None or failure.rank == self.rank or self._stopped.is_set():
                continue
            if failure.consequence and not self._raised.is_set():
                frame = sys._current_frames().get(main_thread)
                stack = "".join(traceback.format_stack(frame)) if frame else "(no Python frame)\n"
                self._store.set(f"stack/{self.rank}", stack)
            self.wait_until_printed()
            end_process(failure.exit_code)

    def wait_until_printed(self) -> None:
        """Give the first rank time to print: launchers kill all ranks when one ends."""
        self._wait_for("printed", 4 * self.poll_s + 5)

    def leave(self, *, failed: bool) -> None:
        """Stop watching. The rank that hosts the store stays until the others have left or seen the failure."""
        self._stopped.set()
        if self._watcher is not None:
            self._watcher.join()
        if self.world_size == 1:
            return
        if failed:
            if self.hosted_here:
                time.sleep(4 * self.poll_s)
            return
        self._store.set(f"left/{self.rank}", "1")
        if self.hosted_here:
            others = [f"left/{rank}" for rank in range(self.world_size) if rank != self.rank]
            deadline = time.monotonic() + _LEAVE_TIMEOUT_S
            while not self._store.check(others) and not self._store.check(["first"]) and time.monotonic() < deadline:
                time.sleep(self.poll_s)


def print_error(text: str) -> None:
    """Write to stderr at once, after whatever was printed before."""
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def end_process(exit_code: int) -> None:
    """End this process now, from any thread, also while another is blocked in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(exit_code)


@contextlib.contextmanager
def guard_rank(board: FailureBoard) -> Iterator[FailureBoard]:
    """Run a rank's work so that its failure ends the whole job, with the first error named first.

    On an error of its own or of another rank the process ends with that error's exit code: 2 for a UserError,
    else 1; the only rank of a job raises SystemExit with it. `SystemExit` with code 0 or 75 passes through.
    """
    if board.world_size > 1:
        board.watch()
    try:
        yield board
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, EXIT_DONE, EXIT_STOPPED):
            board.leave(failed=False)
            raise
        if isinstance(error, KeyboardInterrupt):  # a signal to all ranks, which the launcher reports
            if board.world_size == 1:
                raise
            end_process(EXIT_FAILED)
        exit_code = _settle(board, error)
        if board.world_size == 1:
            raise SystemExit(exit_code) from None
        # Not a normal exit: destructors of process groups wait for peers that are gone.
        end_process(exit_code)
    board.leave(failed=False)


def _settle(board: FailureBoard, error: BaseException) -> int:
    """Record and report the error, or leave it to the rank that was first; returns the exit code of the job."""
    try:
        failure = board.record(error)
        if failure.rank == board.rank:
            board.report(failure, error)
        else:
            board.wait_until_printed()
        board.leave(failed=True)
    except (dist.DistError, ConnectionError) as board_error:
        # The rank or launcher that hosts the board is gone: nobody else will say what happened here.
        lines = "".join(traceback.format_exception(error))
        print_error(f"rank {board.rank} failed, and could not tell the others ({board_error}):\n{lines}")
        return EXIT_FAILED
    return failure.exit_code
