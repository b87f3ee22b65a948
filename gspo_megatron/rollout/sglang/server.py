"""One SGLang server as a process: started, waited for, ended with everything that it has started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
from gspo_megatron.rollout.sglang.guard import describe

_GUARD = Path(__file__).with_name("guard.py")
_POLL_S = 0.5
_HEALTH_S = 25.0  # SGLang itself gives up on its one token after 20 s
_TELLING = re.compile(r"^(\[.*?\] )?\S*(Error|Exception|Killed|killed|\[guard\])\b")
# Requests to this machine's servers pass no proxy.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Launch:
    """What is needed to start one server, again and again at the same address."""

    address: ServerAddress
    command: Sequence[str]
    environment: Mapping[str, str]
    model_folder: str  # as the server itself will name it
    host: str  # to listen on
    port: int
    log: Path

    @property
    def local_url(self) -> str:
        """Where this machine reaches the server; one that listens everywhere does so on the loopback address too."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return server_url(host, self.port)


def server_url(host: str, port: int) -> str:
    """http://host:port, with an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class SGLangServer:
    """One server and its guard, a small process that ends with this one and takes the server along.

    The key goes to SGLang in a file that only this user can read and that is gone when the server is ready; a command
    line could be read by everybody on the machine. The guard keeps it out of the log.
    """

    def __init__(self, launch: Launch, *, grace_s: float = 20.0) -> None:
        self.launch = launch
        self.address = launch.address
        self.seconds_to_ready: float | None = None
        self._grace_s = grace_s  # from SIGTERM to SIGKILL
        self._guard: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._ending = False  # by stop or kill
        self._started_at = 0.0
        self._log_start = 0
        self._secrets: Path | None = None
        self._lock = threading.Lock()  # of waiting for the guard

    # -- starting --

    def start(self) -> None:
        """Start the process; it isn't ready then. Raises UserError if its port is in use."""
        assert not self.is_running
        check_port(self.launch.host, self.launch.port)
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        key = self.address.api_key
        order = {
            "parent": os.getpid(),
            "command": [*self.launch.command, *self._key_option()],
            "environment": dict(self.launch.environment),
            "secret": key,
            "secret_folder": None if self._secrets is None else str(self._secrets),
            "grace_s": self._grace_s,
        }
        with open(self.launch.log, "ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which stops the server in order
            )
        self._exit_code, self._ending, self.seconds_to_ready = None, False, None
        self._started_at = time.monotonic()
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._guard.stdin as stdin:  # killed already: seen by is_running
            stdin.write(json.dumps(order).encode())

    def _key_option(self) -> list[str]:
        if self.address.api_key is None:
            return []
        self._secrets = Path(tempfile.mkdtemp(prefix="gspo_sglang_"))  # for this user only, as the file in it
        path = self._secrets / "key.yaml"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"api-key: {json.dumps(self.address.api_key)}\n")
        return ["--config", str(path)]

    def _forget_key(self) -> None:
        if self._secrets is not None:
            shutil.rmtree(self._secrets, ignore_errors=True)
            self._secrets = None

    def wait_ready(self, timeout_s: float, cancelled: threading.Event | None = None) -> float:
        """Wait until the server has generated a token; returns the seconds since its start.

        Args:
            timeout_s: longest time since the start; then the server is killed.
            cancelled: gives up when it is set.

        Raises:
            ServerError: the server has ended, took too long, or another one answers at its address; with the last
                telling lines of its log.
        """
        deadline = self._started_at + timeout_s
        while True:
            if not self.is_running:
                raise self._error(f"it {self.how_it_ended()}")
            if cancelled is not None and cancelled.is_set():
                raise ServerError(self.address, "start", "given up")
            left = deadline - time.monotonic()
            if left <= 0:
                error = self._error(f"it was not ready after sglang.start_timeout_s={timeout_s:g} seconds")
                self.kill()
                raise error
            if self._is_healthy(min(left, _HEALTH_S)) and self.is_running:
                break
            time.sleep(_POLL_S)
        self._forget_key()
        self._check_identity()
        self._freeze_garbage()
        self.seconds_to_ready = time.monotonic() - self._started_at
        return self.seconds_to_ready

    def _is_healthy(self, timeout_s: float) -> bool:
        try:
            with _HTTP.open(f"{self.launch.local_url}/health_generate", timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):  # refused, reset, timed out, 503
            return False

    def _check_identity(self) -> None:
        """Whether it's this server that answers: another program may have taken a free port first."""
        try:
            # As it was started: /model_info tells what it was sent since, if a trainer was quicker than this look.
            found = json.loads(self._ask("GET", "/server_info")).get("model_path")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._error(f"/server_info: {error}") from None
        if found != self.launch.model_folder:
            raise self._error(f"another server answers, which serves {found!r} and not {self.launch.model_folder!r}")

    def _freeze_garbage(self) -> None:
        """Spare what was made at the start all later garbage collections, which would look through it again and again.
        SGLang does so after its warm-up; without one it asks itself too early, before it listens."""
        with contextlib.suppress(OSError, http.client.HTTPException):  # it is slower then, no worse
            self._ask("POST", "/freeze_gc")

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"{self.launch.local_url}{path}", method=method)
        if self.address.api_key is not None:
            request.add_header("Authorization", f"Bearer {self.address.api_key}")
        with _HTTP.open(request, timeout=_HEALTH_S) as answer:
            return bytes(answer.read())

    # -- while it runs --

    @property
    def pid(self) -> int:
        """Process number of the guard, whose group holds the server; a signal to it reaches them all."""
        assert self._guard is not None
        return self._guard.pid

    @property
    def is_running(self) -> bool:
        """Whether the server's process is there; whether it answers is another question."""
        with self._lock:
            if self._guard is None or self._exit_code is not None:
                return False
            # WNOWAIT: until it is waited for, nobody else can get its number, which is the group's number too.
            ended = os.waitid(os.P_PID, self._guard.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return True
            _kill_group(self._guard.pid)  # what a guard that was killed has left behind
            code = self._guard.wait()
            self._exit_code = 128 - code if code < 0 else code
        self._forget_key()
        return False

    @property
    def ended_by_itself(self) -> bool:
        """Whether the process is gone though nobody has asked for it."""
        return self._guard is not None and not self.is_running and not self._ending

    def how_it_ended(self) -> str:
        """'ended with exit code 1', 'was ended by SIGKILL'."""
        assert self._exit_code is not None
        is_signal = 128 < self._exit_code <= 128 + signal.SIGRTMAX
        return describe(128 - self._exit_code if is_signal else self._exit_code)

    def log_end(self) -> str:
        """The last telling lines of the log since the last start: errors, where there are any."""
        try:
            with open(self.launch.log, "rb") as file:
                file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - 100_000))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        lines = [line.rstrip()[:300] for line in lines if line.strip()]
        return "\n".join([line for line in lines if _TELLING.match(line)][-5:] or lines[-10:])

    def _error(self, reason: str) -> ServerError:
        end = self.log_end()
        lines = f"; the end of {self.launch.log}:\n{end}" if end else f"; its log is {self.launch.log}"
        return ServerError(self.address, "start", reason + lines)

    # -- ending --

    def stop(self) -> None:
        """SIGTERM, SIGKILL after the grace; returns when no process of the server is left."""
        self._end(signal.SIGTERM, self._grace_s + 10)

    def kill(self) -> None:
        """SIGKILL at once; returns when no process of the server is left."""
        self._end(signal.SIGUSR1, 10)

    def _end(self, signal_: signal.Signals, patience_s: float) -> None:
        self._ending = True
        if not self.is_running:
            return
        os.kill(self.pid, signal_)
        deadline = time.monotonic() + patience_s
        while self.is_running:
            if time.monotonic() > deadline:  # a guard that was stopped or swapped out
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.05)


def _kill_group(group: int) -> None:
    """SIGKILL every process of the group, and wait until only those are left that have ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not _has_living(group):
            return
        time.sleep(0.05)


def _has_living(group: int) -> bool:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Ports
# ---------------------------------------------------------------------------------------------------------------------


def check_port(host: str, port: int) -> None:
    """Raise UserError unless a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(
                f"no server can listen on {host}, port {port}: {error.strerror}; set sglang.port to another port, or "
                "to 0 for a free one, and sglang.host to an address of this machine"
            ) from None


def free_ports(host: str, count: int) -> list[int]:
    """Ports on which nothing listens, different from each other.

    Below the range from which Linux takes ports for outgoing connections: a server starts to listen long after its port
    was chosen.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32768), 1000):
        if len(found) == count:
            break
        try:
            check_port(host, port)
        except UserError:
            continue
        found.append(port)
    if len(found) < count:
        check_port(host, 0)  # not the ports are to blame, but the address
        raise UserError(f"{count} free ports between 20000 and 32767 were not found on {host}; set sglang.port")
    return found
