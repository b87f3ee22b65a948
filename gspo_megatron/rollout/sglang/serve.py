"""`python -m gspo_megatron serve`: SGLang servers in the foreground, for a trainer on this machine or another."""

from __future__ import annotations

import dataclasses
import logging
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.api_key import ENVIRONMENT_VARIABLE, describe_api_key, is_random
from gspo_megatron.rollout.sglang.manager import ServerManager

_LOOK_S = 0.5


def run(config: TrainConfig) -> None:
    """Serve until SIGINT or SIGTERM. A server that ends is started again, `sglang.retries` times in a row.

    Raises:
        UserError: what the user can repair.
        ServerError: a server didn't start, or ended too often.
    """
    # The addresses of an earlier start may be in the file: they are for the trainer.
    sglang = dataclasses.replace(config.sglang, addresses="")
    if is_random(sglang):
        raise UserError(
            f"sglang.host={sglang.host} can be reached by other machines, so its servers need a key that the trainer "
            "has too: make one with (umask 077; openssl rand -hex 32 > FILE) and set sglang.api_key_file on both "
            f"sides, or set the environment variable {ENVIRONMENT_VARIABLE}"
        )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _request_stop(stop))
    logs = Path(config.run.folder) / "servers" / socket.gethostname()
    try:
        with (
            ThreadPoolExecutor(sglang.servers) as starting,  # ends after the manager, which ends what it waits for
            ServerManager(
                sglang, config.model.path, config.model.dtype, logs, random_weights=config.model.init == "random"
            ) as manager,
        ):
            addresses = manager.start()
            print(_paste(addresses), f"# {describe_api_key(sglang)}; Ctrl-C or SIGTERM ends them", sep="\n", flush=True)
            restarts: dict[int, Future[None]] = {}
            while True:
                time.sleep(_LOOK_S)
                for index in [index for index, restart in restarts.items() if restart.done()]:
                    restarts.pop(index).result()
                for index in manager.dead():
                    if index not in restarts:
                        restarts[index] = starting.submit(manager.restart, index)
    except _Stopped:
        print("stopped", flush=True)


class _Stopped(BaseException):
    """A signal came."""


def _request_stop(stop: threading.Event) -> None:
    # The first signal leaves whatever is waited for; further ones must not disturb the stopping itself.
    if not stop.is_set():
        stop.set()
        raise _Stopped


def _paste(addresses: list[ServerAddress]) -> str:
    return f'[sglang]\naddresses = "{",".join(address.url for address in addresses)}"'
