"""The training ranks of benchmark_reshard.py measured: one process each, for all cases of a layout."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.rollout.sglang.server import free_ports
from reshard.trainer import TIMEOUT_S, Case, Measured, Rank

START_TIMEOUT_S = 240.0


class Ranks:
    """The processes of one layout."""

    def __init__(self, layout: dict[str, int], world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        [port] = free_ports("127.0.0.1", 1)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, port, layout, str(folder), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_TIMEOUT_S)

    def measure(self, case: Case) -> list[Measured]:
        """What each rank measured."""
        for pipe in self._pipes:
            pipe.send(case)
        return self._answers(TIMEOUT_S)

    def _answers(self, timeout_s: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout_s):
                raise RuntimeError(f"rank {rank}: no answer within {timeout_s:g} s")
            answer = pipe.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank}: {answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, layout: dict[str, int], folder: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    importlib.import_module("gspo_megatron.policy.policy")
    try:
        member = Rank(layout, folder)
        pipe.send(True)
        while True:
            pipe.send(member.measure(pipe.recv()))
    except EOFError:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())
