"""Processes that stay up for a whole test module and run one case after another on every rank.

Importing torch and Megatron costs seconds a process; a layout costs milliseconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT_S = 240.0  # imports take seconds a process, many times that on a busy machine
TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _reuse_groups() -> None:
    """One process group per set of ranks, for all cases.

    Each layout makes dozens of gloo groups with threads of their own, and Megatron's DDP never lets go of
    those it has seen. All ranks ask for the same sets in the same order, so the cache is the same on all.
    """
    import torch.distributed as dist

    new_group = dist.new_group
    made: dict[tuple[int, ...], Any] = {}

    def cached(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = tuple(sorted(range(dist.get_world_size()) if ranks is None else ranks))
        if key not in made:
            made[key] = new_group(list(key), *args, **kwargs)
        return made[key]

    dist.new_group = cached


def _serve(rank: int, world_size: int, port: int, pipe: Connection, shares_groups: bool) -> None:
    """Run cases as they come: ("module:function", kwargs) -> ("ok", result) or ("error", traceback)."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    if shares_groups:
        _reuse_groups()
    importlib.import_module("gspo_megatron.policy.policy")
    pipe.send("ready")
    while True:
        message = pipe.recv()
        if message is None:
            break
        name, kwargs = message
        module, function = name.split(":")
        try:
            pipe.send(("ok", getattr(importlib.import_module(module), function)(**kwargs)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
            break


class RankPool:
    """`world_size` processes; after a failed case they are started anew. Without `shares_groups` each case makes all
    of its process groups."""

    def __init__(self, world_size: int, *, shares_groups: bool = True) -> None:
        self.world_size, self.shares_groups = world_size, shares_groups
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, case: str, **kwargs: Any) -> list[Any]:
        """The case's result on each rank. Raises AssertionError with the traceback of a rank that failed."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((case, kwargs))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(5 if errors else TIMEOUT_S):
                errors.append(f"rank {rank}: no answer")
                continue
            try:
                status, value = pipe.recv()
            except EOFError:
                errors.append(f"rank {rank}: died")
                continue
            (results if status == "ok" else errors).append(value if status == "ok" else f"rank {rank}: {value}")
        if errors:
            self.close()
            raise AssertionError(f"{case}({kwargs}):\n" + "\n".join(errors))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, theirs, self.shares_groups), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        for pipe in self.pipes:
            assert pipe.poll(START_TIMEOUT_S), "a rank did not start"
            assert pipe.recv() == "ready"

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes, self.pipes = [], []
