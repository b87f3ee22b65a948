"""The SGLang servers of this machine: started together, watched, restarted where the caller asks for it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
from gspo_megatron.rollout.sglang.api_key import find_api_key
from gspo_megatron.rollout.sglang.command import check_servers, has_weights, server_command, server_environment
from gspo_megatron.rollout.sglang.server import Launch, SGLangServer, free_ports, server_url

logger = logging.getLogger(__name__)

_WATCH_S = 0.5
_SETTLED_S = 600.0  # a server that has run for so long has not failed "in a row"


def _print(line: str) -> None:
    print(line, flush=True)


class ServerManager:
    """Starts `config.servers` servers and ends them with the context.

    Args:
        config: the servers; its `addresses` are not read.
        model_folder: Hugging Face folder. Without safetensors in it servers start with random weights.
        dtype: of the weights, "float32" or "bfloat16", where `config.dtype` is "auto".
        log_folder: for one log a server, server_0.log and so on.
        first_gpu: the servers take GPUs from this one on, `config.tensor` each; on machines with GPUs.
        random_weights: start with random weights though the folder has some; loading is quicker.
        say: called with one line a server when it is ready.
    """

    def __init__(
        self,
        config: SGLangConfig,
        model_folder: str | Path,
        dtype: str,
        log_folder: str | Path,
        *,
        first_gpu: int = 0,
        random_weights: bool = False,
        say: Callable[[str], None] = _print,
    ) -> None:
        self._config = config
        self._model_folder = os.path.abspath(model_folder)
        self._dtype = dtype if config.dtype == "auto" else config.dtype
        self._log_folder = Path(log_folder)
        self._first_gpu = first_gpu
        self._random_weights = random_weights or not has_weights(model_folder)
        self._say = say
        self._servers: list[SGLangServer] = []
        self._restarts: list[int] = []  # of each server, in a row
        self._ready_at: list[float] = []
        self._noticed: set[int] = set()  # servers whose end was said
        self._noticing = threading.Lock()
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> ServerManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> list[ServerAddress]:
        """Start all servers and wait until each has generated a token; returns their addresses.

        Raises:
            UserError: what the user can repair: no SGLang, a port in use, no key to be read, too few GPUs …
            ServerError: a server ended or was too slow; the others are ended too.
        """
        assert not self._servers, "started already"
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        check_servers(self._config, model_folder=self._model_folder, gpus=gpus, first_gpu=self._first_gpu)
        self._servers = [SGLangServer(launch) for launch in self._plan(gpu=gpus > 0)]
        self._restarts = [0] * len(self._servers)
        try:
            for server in self._servers:
                server.start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        self._ready_at = [time.monotonic()] * len(self._servers)
        self._watcher = threading.Thread(target=self._watch, name="sglang-watch", daemon=True)
        self._watcher.start()
        return [server.address for server in self._servers]

    def _plan(self, *, gpu: bool) -> list[Launch]:
        """What each server is started with."""
        config = self._config
        key = find_api_key(config)
        count = config.servers
        ports = [config.port + i for i in range(count)] if config.port else free_ports(config.host, count)
        if ports[-1] >= 2**16:
            raise UserError(f"sglang.port={config.port}: port {ports[-1]} of the last server is above 65535; lower it")
        environment = server_environment(
            config, gpu=gpu, cores=sorted(os.sched_getaffinity(0)), inherited=dict(os.environ)
        )
        host = reachable_host(config.host)
        launches = []
        for index, port in enumerate(ports):
            command = server_command(
                config,
                model_folder=self._model_folder,
                dtype=self._dtype,
                port=port,
                gpu=gpu,
                first_gpu=self._first_gpu + index * config.tensor,
                random_weights=self._random_weights,
            )
            address = ServerAddress(server_url(host, port), key)
            log = self._log_folder / f"server_{index}.log"
            launches.append(Launch(address, command, environment, self._model_folder, config.host, port, log))
        return launches

    def _wait_ready(self) -> None:
        """All at once; the first that fails ends the waiting for the others."""
        cancelled = threading.Event()
        with ThreadPoolExecutor(len(self._servers)) as pool:
            waiting = [pool.submit(s.wait_ready, self._config.start_timeout_s, cancelled) for s in self._servers]
            try:
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                cancelled.set()
                for server in self._servers:  # ends the requests that the other threads wait for
                    server.kill()
                raise
        for index in range(len(self._servers)):
            self._say(self._summary(index))

    def _summary(self, index: int) -> str:
        server = self._servers[index]
        return (
            f"SGLang server {index}: {server.address.url}, ready after {server.seconds_to_ready:.0f} s, "
            f"pid {server.pid}, log {server.launch.log}"
        )

    def dead(self) -> list[int]:
        """Indices of the servers whose process has ended. One that runs but answers nothing is none of them."""
        return [index for index, server in enumerate(self._servers) if not server.is_running]

    def restart(self, index: int) -> None:
        """Start a server again at its address, and wait for it; one that still runs is killed first.

        It then holds the weights of `model_folder`, or random ones, not those it was sent.

        Raises:
            ServerError: it was started again `config.retries` times in a row; with the end of its log. A server that
                has been ready for ten minutes starts a new row.
        """
        server = self._servers[index]
        if time.monotonic() - self._ready_at[index] > _SETTLED_S:
            self._restarts[index] = 0
        self._notice(index)  # the watching thread may not have looked yet
        server.kill()
        while self._restarts[index] < self._config.retries:
            self._restarts[index] += 1
            server.start()
            try:
                server.wait_ready(self._config.start_timeout_s, self._stopped)
            except ServerError as error:
                server.kill()
                if self._stopped.is_set():
                    raise
                logger.warning("%s", error)
                continue
            self._ready_at[index] = time.monotonic()
            self._say(self._summary(index))
            return
        raise ServerError(
            server.address,
            "restart",
            f"it has ended again after {self._restarts[index]} restarts in a row (sglang.retries); the end of "
            f"{server.launch.log}:\n{server.log_end()}",
        )

    def stop(self) -> None:
        """End all servers; returns when none of their processes is left. May be called again."""
        self._stopped.set()
        if self._servers:
            with ThreadPoolExecutor(len(self._servers)) as pool:
                list(pool.map(SGLangServer.stop, self._servers))
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_S):
            for index in range(len(self._servers)):
                self._notice(index)

    def _notice(self, index: int) -> None:
        """Say once when a process has ended that nobody has ended."""
        server = self._servers[index]
        with self._noticing:
            if not server.ended_by_itself:
                self._noticed.discard(index)
            elif index not in self._noticed:
                self._noticed.add(index)
                url, how, log = server.address.url, server.how_it_ended(), server.launch.log
                logger.warning("SGLang server %s %s; the end of %s:\n%s", url, how, log, server.log_end())


def reachable_host(host: str) -> str:
    """What others call this machine, where the servers listen on all its addresses; else the address itself."""
    if host not in ("0.0.0.0", "::"):
        return host
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        raise UserError(
            f"sglang.host={host}: this machine's own name {name!r} has no address; set sglang.host to the address "
            "at which other machines reach it"
        ) from None
    return name
