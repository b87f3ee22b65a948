"""One rank of the jobs that test_launch.py starts: gloo, a collective, and a way to fail. The last rank fails.

python launch_worker.py MODE [RANKS]   with RANKS: the launcher of the job
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from gspo_megatron.errors import UserError
from gspo_megatron.failures import FailureBoard, guard_rank
from gspo_megatron.launch import launch_local


def all_reduce_forever(group: dist.ProcessGroup | None = None) -> None:
    value = torch.ones(4)
    while True:
        dist.all_reduce(value, group=group)


def work(mode: str, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    dist.all_reduce(torch.ones(1))
    last = rank == world_size - 1
    if mode == "done":
        if last:
            time.sleep(1.5)  # the others, the host of the store among them, are ready first
        print(f"rank {rank} done", flush=True)
        dist.destroy_process_group()
        return
    if mode == "raise" and last:
        time.sleep(0.5)  # the others are blocked in the collective
        raise RuntimeError("the last rank broke")
    if mode == "raise_on_0":
        if rank == 0:
            raise RuntimeError("the first rank broke")
        time.sleep(300)  # not in a collective: only the watcher can end this rank
    if mode == "raise_late" and last:
        try:
            raise KeyError("the cause")
        finally:
            dist.destroy_process_group()  # the others' collectives fail before this error is recorded
            time.sleep(1.0)
    if mode == "hang":
        # The others time out in a group of their own, so that a slow start is no timeout.
        group = dist.new_group(timeout=timedelta(seconds=4))
        if last:
            time.sleep(300)
        all_reduce_forever(group)
    if mode == "user_error" and last:
        raise UserError("model.path=/m has 3 extra tensors; remove them")
    if mode == "kill" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stopped":
        dist.destroy_process_group()  # in order: an open group may abort the process of a peer that goes later
        raise SystemExit(75)
    all_reduce_forever()


def main() -> int:
    mode = sys.argv[1]
    if len(sys.argv) > 2:
        return launch_local(int(sys.argv[2]), [sys.executable, __file__, mode])
    board = FailureBoard.from_environment()
    board.grace_s = 2.0
    with guard_rank(board):
        work(mode, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
