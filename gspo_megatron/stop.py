"""SIGTERM and SIGUSR1 ask a run to save and to stop; a second one ends the process at once.

Nothing but the standard library is imported at first, so that a signal is noticed from the start. What it asks for is
done by whoever looks at `StopSignals.received`: the trainer after each rollout batch, the launcher by passing it on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on what the scheduler may send to every process anyway: that is one request.
SAME_REQUEST_S = 2.0
EXIT_ENDED = 1


class StopSignals:
    """The signals that this process was sent.

    A thread takes them, not the main thread: Python runs handlers only between two of the main thread's instructions,
    and it may be blocked in a collective for minutes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.on_signal: Callable[[signal.Signals], None] | None = None  # called from the thread, for each
        self._first_at = 0.0
        self._is_ignoring = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Take SIGTERM and SIGUSR1 for as long as the context lasts. For the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._take, args=(read,), name="stop-signals", daemon=True)
        thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher's ranks start with them blocked
        try:
            yield self
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(write)
            thread.join()
            os.close(read)

    def ignore(self) -> None:
        """From now on the process ends by itself; further signals don't matter."""
        self._is_ignoring = True

    def _take(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS and not self._is_ignoring:
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and self.on_signal is None and _a_rank_has_ended():
            os._exit(EXIT_ENDED)  # whoever started the ranks ends those that are left
        if self.on_signal is not None:
            self.on_signal(number)
        elif self.received is None:
            if os.environ.get("RANK", "0") == "0":
                _say(
                    f"{number.name}: the run saves and stops after this rollout batch; a second signal ends it at once"
                )
        elif now > self._first_at + SAME_REQUEST_S:
            _say(f"{number.name}, the second signal: ends at once, without saving")
            os._exit(EXIT_ENDED)
        if self.received is None:
            self.received, self._first_at = number, now


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started inside are born with the signals blocked, until they are ready for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _a_rank_has_ended() -> bool:
    """Whether of the ranks that were started on this machine together with this one some are no more."""
    expected = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if expected == 1:
        return False
    import psutil

    try:
        own = psutil.Process().cmdline()
        ranks = [p for p in psutil.Process(os.getppid()).children() if _runs(p, own)]
    except psutil.Error:
        return False
    return 0 < len(ranks) < expected


def _runs(process: Any, command: list[str]) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline() == command
    return False


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
