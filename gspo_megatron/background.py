"""Work in a forked process: it sees memory as it was at the fork, whatever the trainer does to its own meanwhile."""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Literal

import torch

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_MOST_BYTES = 4096  # of an error's text: fits the pipe, so that the process never waits for a reader

Status = Literal["running", "done", "failed"]


class Background:
    """One piece of work under way. The process ends with its parent, however that ends, and takes no signals."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._pipe, write = os.pipe()
        self._status: Status = "running"
        self.error = ""  # of work that failed
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forks beside threads
            self._pid = os.fork()
        if self._pid == 0:
            _run(work, parent, write)
        os.close(write)

    def look(self) -> Status:
        """How it stands, without waiting."""
        if self._status == "running":
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._end(status)
        return self._status

    def stop(self) -> None:
        """End it wherever it is."""
        if self._status == "running":
            os.kill(self._pid, signal.SIGKILL)
            self._end(os.waitpid(self._pid, 0)[1])

    def _end(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        said = os.read(self._pipe, _MOST_BYTES).decode(errors="replace") if _has_data(self._pipe) else ""
        os.close(self._pipe)
        self._status = "done" if code == 0 else "failed"
        ended = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
        self.error = "" if code == 0 else said or ended


def _has_data(pipe: int) -> bool:
    return bool(select.select([pipe], [], [], 0)[0])


def _run(work: Callable[[], None], parent: int, pipe: int) -> None:
    """The life of the forked process. Never returns: what its parent would do at its end is not its business."""
    code = 1
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            gc.disable()  # would finalize the parent's objects, on its devices
            torch.set_num_threads(1)  # the threads of the parent's pool do not live here
            work()
            code = 0
    except BaseException as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        os.write(pipe, text.encode()[:_MOST_BYTES])
    finally:
        os._exit(code)
