"""A small process between the trainer and one SGLang server, so that no process of the server outlives either.

Run by its path, with the standard library alone. It starts the server, ends everything that the server has started when
the server ends, when it is told to (SIGTERM: let the server shut down first; SIGUSR1: at once) or when its own parent
is gone, however that went. The same signals from anybody else do nothing: a scheduler sends those that ask the trainer
to save and stop to every process, while the trainer still needs its servers. It copies the server's output, in which it
replaces the server's key: SGLang writes all its arguments into its log. At its end it removes the folder in which the
key was handed over, and the files in shared memory that the server leaves: SGLang ends its own processes with SIGKILL.

The order comes as JSON on standard input: parent (its process number), command, environment, secret and secret_folder
(or null), grace_s.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TICK_S = 0.2
_LOOK_S = 1.0  # how often the server's shared memory is looked up
_SETTLED_S = 60.0  # from then on less often: it stays what it is once the server is ready
_SHARED = "/dev/shm/sgl"  # SGLang's own; others that it maps are the trainer's
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LIBC = ctypes.CDLL(None, use_errno=True)


class Output:
    """Copies from a pipe to standard output, with the secret replaced."""

    def __init__(self, source: int, secret: str | None) -> None:
        self.source, self.open = source, True
        self._secret = secret.encode() if secret else None
        self._rest = b""
        os.set_blocking(source, False)

    def copy(self) -> None:
        """Write on the whole lines that are there; the end of an unfinished one may be half of the secret."""
        try:
            chunk = os.read(self.source, 65536)
        except BlockingIOError:
            return
        self.open = bool(chunk)
        self._rest += chunk
        if self._secret:
            self._rest = self._rest.replace(self._secret, b"***")
        self._write(self._rest.rfind(b"\n") + 1 or max(0, len(self._rest) - 65536))

    def finish(self) -> None:
        """Write on all that is left; a process that escaped may still hold the pipe's other end."""
        while self.open and select.select([self.source], [], [], 0)[0]:
            self.copy()
        if self._rest:
            self._rest += b"\n"  # what the guard says next is a line of its own
        self._write(len(self._rest))

    def _write(self, end: int) -> None:
        written = 0
        while written < end:
            written += os.write(1, self._rest[written:end])
        self._rest = self._rest[end:]


class Guard:
    """The server, and what is to happen to it."""

    def __init__(self) -> None:
        self._stop_at: float | None = None  # when SIGTERM came
        self._kill = False
        # Descendants whose parent ends become children of this process, also those in sessions of their own.
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _take_signals(self, parent: int) -> None:
        """Note the signals that have come from the parent. They are blocked: that way they tell who sent them."""
        while (signalled := signal.sigtimedwait(_SIGNALS, 0)) is not None:
            if signalled.si_pid == parent and signalled.si_signo == signal.SIGUSR1:
                self._kill = True
            elif signalled.si_pid == parent:
                self._stop_at = self._stop_at or time.monotonic()

    def run(self, order: dict) -> int:
        """Returns the exit code: the server's, or 128 + the signal that ended it."""
        try:
            server = subprocess.Popen(
                order["command"],
                env=order["environment"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_guard,
            )
        except OSError as error:
            _say(f"{order['command'][0]} cannot be started: {error.strerror}")
            return 127
        assert server.stdout is not None
        output = Output(server.stdout.fileno(), order["secret"])
        status, why = None, ""
        asked = False
        shared: set[str] = set()
        looked_at = changed_at = time.monotonic()
        while status is None and not why:
            select.select([output.source] if output.open else [], [], [], _TICK_S)
            output.copy()
            self._take_signals(order["parent"])
            now = time.monotonic()
            if now > looked_at + (_LOOK_S if not shared or now < changed_at + _SETTLED_S else 10 * _LOOK_S):
                looked_at, before = now, len(shared)
                shared |= _shared_files()
                changed_at = now if len(shared) > before else changed_at
            status = _reap(server.pid)
            if os.getppid() != order["parent"]:
                why = f"its parent, process {order['parent']}, is gone"
            elif self._kill:
                why = "it was told to end at once"
            elif self._stop_at is not None and not asked and status is None:
                os.kill(server.pid, signal.SIGTERM)
                asked = True
            elif self._stop_at is not None and time.monotonic() > self._stop_at + order["grace_s"]:
                why = f"it did not end within {order['grace_s']:g} s of SIGTERM"
        shared |= _shared_files()
        ended = _end_children(server.pid)
        for path in shared:
            with contextlib.suppress(OSError):  # it was removed in order
                os.unlink(path)
        server.returncode = 0  # it is reaped; subprocess need not ask
        output.finish()
        code = os.waitstatus_to_exitcode(ended if status is None else status)
        _say(f"the server was killed: {why}" if status is None else f"the server {describe(code)}")
        return 128 - code if code < 0 else code


def describe(code: int) -> str:
    """An exit code in words, negative for a signal."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _die_with_guard() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Even a guard that is killed takes the server along; SGLang's children do the same after their parent.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _say(text: str) -> None:
    os.write(1, f"[guard] {text}\n".encode())


def _reap(server: int) -> int | None:
    """Wait for children that have ended, without blocking; returns the server's status if it is one of them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == server:
            found = status


def _end_children(server: int) -> int:
    """Kill all children, and theirs, which then become children of this process; returns the server's status."""
    status = 0
    while children := _children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        found = _reap(server)
        status = status if found is None else found
    return status


def _children() -> list[int]:
    return _by_parent().get(os.getpid(), [])


def _by_parent() -> dict[int, list[int]]:
    """Each process's children."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = file.read().rpartition(b")")[2].split()[1]
            except OSError:  # it has ended
                continue
            found.setdefault(int(parent), []).append(int(name))
    return found


def _shared_files() -> set[str]:
    """SGLang's files in shared memory that this process's descendants have mapped."""
    by_parent = _by_parent()
    pids, found = list(by_parent.get(os.getpid(), [])), set()
    for pid in pids:
        pids += by_parent.get(pid, [])
        try:
            with open(f"/proc/{pid}/maps", errors="replace") as file:
                found |= {line.split()[5] for line in file if _SHARED in line}
        except OSError:  # it has ended
            continue
    return found


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    received = json.load(sys.stdin)
    try:
        sys.exit(Guard().run(received))
    finally:
        if received["secret_folder"] is not None:
            shutil.rmtree(received["secret_folder"], ignore_errors=True)
