"""Work in a forked process: it sees memory as it was at the fork, whatever the trainer does to its own meanwhile.

For that the kernel copies each page that either of them writes, when it is first written, which costs more than copying
it beforehand. Memory that the process does not need is therefore kept from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

_PR_SET_PDEATHSIG = 1
_MADV_DONTFORK, _MADV_DOFORK = 10, 11
_LIBC = ctypes.CDLL(None)
_MOST_BYTES = 4096  # of an error's text: fits the pipe, so that the process never waits for a reader

Status = Literal["running", "done", "failed"]


class Background:
    """One piece of work under way. The process ends with its parent, however that ends, and takes no signals."""

    def __init__(self, work: Callable[[], None], *, withheld: Iterable[Tensor] = ()) -> None:
        """`withheld`: tensors that the work must not touch, not even by a view: their memory is not there."""
        self._pipe, write = os.pipe()
        self._status: Status = "running"
        self.error = ""  # of work that failed
        parent = os.getpid()
        with warnings.catch_warnings(), _withholding(withheld):
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


class SharedMemory:
    """Memory that a forked process shares rather than sees as it was; kept and used again. For one piece of work at a
    time."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def copy(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copies of the tensors, on any device, one after the other; they replace those of the call before."""
        tensors = list(tensors)
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // 64) * 64
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(-1, max(size, 1))
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            copies.append(flat.view(tensor.shape).copy_(tensor.detach()))
        return copies


@contextlib.contextmanager
def _withholding(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A process that is forked inside does not get the pages that the tensors' storages fill."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if t.device.type == "cpu" and (s := t.untyped_storage())}
    page = mmap.PAGESIZE
    spans = [(-(-start // page) * page, (start + size) // page * page) for start, size in storages.items()]
    spans = [(start, end) for start, end in spans if start < end]
    _advise(spans, _MADV_DONTFORK)
    try:
        yield
    finally:
        _advise(spans, _MADV_DOFORK)


def _advise(spans: list[tuple[int, int]], advice: int) -> None:
    for start, end in spans:
        failed = _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
        assert not failed, f"madvise({advice}) of {end - start} bytes"


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
