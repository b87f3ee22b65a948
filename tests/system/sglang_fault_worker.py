"""The program's own command, with a fault armed that strikes a server or the trainer. Started by test_sglang_faults.py.

python sglang_fault_worker.py COMMAND …, with FAULT_FOLDER and FAULT (JSON, see `Fault`) in the environment

Each rank leaves in FAULT_FOLDER its process id, the rollouts that `collect` gave it, and, the one that struck, when.
Servers that are started here leave their guard's process id by their port, as the test does for those it starts.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gspo_megatron import cli, launch
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.stop import StopSignals

FOLDER = Path(os.environ["FAULT_FOLDER"])
SENT_S = 0.3  # in which a request reaches a server that is stopped


@dataclass
class Fault:
    """What happens, and when."""

    what: str  # kill, hang: a server; trainer: all ranks are killed; doom: a server, its guard and its model are
    phase: str  # generate or update: a request is on its way to the server
    version: int  # of the weights that are then in use, or on their way
    server: int = 0  # its number
    armed: bool = False
    update_version: int = -1


def guard_of(url: str) -> psutil.Process:
    return psutil.Process(int((FOLDER / f"guard_{url.rpartition(':')[2]}").read_text()))


def mark(name: str) -> bool:
    """Leave the time under this name; False if it was left before, by any rank."""
    try:
        with (FOLDER / name).open("x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return False
    return True


def signal_server(guard: psutil.Process, number: signal.Signals) -> None:
    """To all processes of a server but its guard."""
    for process in guard.children(recursive=True):
        process.send_signal(number)


async def strike(fault: Fault, url: str, request: Callable[[], Any], model: Path) -> Any:
    """Let the fault happen while the request is on its way."""
    if fault.what == "trainer":
        sending = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        mark("struck")
        ranks = [int(path.read_text()) for path in FOLDER.glob("rank_*")]
        for pid in sorted(ranks, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)
        return await sending
    guard = guard_of(url)
    signal_server(guard, signal.SIGSTOP)
    sending = asyncio.ensure_future(request())
    await asyncio.sleep(SENT_S)
    assert not sending.done(), "the fault must strike while a request is on its way"
    (FOLDER / "in_flight").touch()
    if fault.what != "hang":
        if fault.what == "doom":
            shutil.rmtree(model)
            os.killpg(guard.pid, signal.SIGKILL)
        else:
            signal_server(guard, signal.SIGKILL)
    return await sending


def arm(fault: Fault, model: Path) -> None:
    """Put the fault into this process's calls of servers."""
    from gspo_megatron.rollout.sglang.client import ServerClient
    from gspo_megatron.rollout.sglang.engine import SGLangEngine
    from gspo_megatron.rollout.sglang.pool import ServerPool

    addresses: list[str] = []
    generate_all, begin_update = ServerPool.generate, SGLangEngine.begin_update

    def pool_generate(self: ServerPool, *args: Any, **kwargs: Any) -> Any:
        fault.armed = fault.phase == "generate" and kwargs["version"] == fault.version and kwargs.get("only") is None
        addresses[:] = addresses or [client.address.url for client in self.clients]
        return generate_all(self, *args, **kwargs)

    def engine_begin_update(self: SGLangEngine, version: int) -> None:
        fault.armed = fault.phase == "update" and version == fault.version
        addresses[:] = addresses or [address.url for address in self.served]
        begin_update(self, version)

    def armed(name: str) -> None:
        call = getattr(ServerClient, name)

        @functools.wraps(call)
        async def wrapped(self: ServerClient, *args: Any) -> Any:
            request = functools.partial(call, self, *args)
            if fault.armed and self.address.url == addresses[fault.server] and mark("struck"):
                return await strike(fault, self.address.url, request, model)
            return await request()

        setattr(ServerClient, name, wrapped)

    ServerPool.generate = pool_generate  # type: ignore[method-assign]
    SGLangEngine.begin_update = engine_begin_update  # type: ignore[method-assign]
    for name in ("generate", "update_from_distributed", "update_from_tensor", "update_from_disk"):
        if (name == "generate") == (fault.phase == "generate"):
            armed(name)


def watch_closely() -> None:
    """Look after servers every second, not every five: a hung one is to be found out within the test."""
    from gspo_megatron.rollout.sglang import dispatch, pool

    pool.Timing = functools.partial(dispatch.Timing, probe_every_s=1.0, probe_timeout_s=3.0)  # type: ignore


def record_rollouts() -> None:
    """Write down what training gets, group by group."""
    from gspo_megatron import trainer

    collect = trainer.collect

    def recorded(job: Any, *args: Any, **kwargs: Any) -> Any:
        experience = collect(job, *args, **kwargs)
        with (FOLDER / f"groups_{job.groups.rank}.jsonl").open("a") as file:
            for group in experience.groups:
                versions = {
                    int(v) for r in group.rollouts for v in r.policy_versions[r.response_mask].unique().tolist()
                }
                # Two that end at once may well be alike.
                long = [tuple(r.token_ids.tolist()) for r in group.rollouts if r.response_mask.sum() > 4]
                line = {
                    "batch": kwargs["batch"],
                    "prompt": group.prompt.id,
                    "rollouts": len(group.rollouts),
                    "repeated": len(long) - len(set(long)),
                    "versions": sorted(versions),
                    "finish_reasons": sorted({r.finish_reason for r in group.rollouts}),
                }
                file.write(json.dumps(line) + "\n")
        return experience

    trainer.collect = recorded


def leave_guards() -> None:
    from gspo_megatron.rollout.sglang.server import SGLangServer

    start = SGLangServer.start

    def started(self: SGLangServer) -> None:
        start(self)
        (FOLDER / f"guard_{self.launch.port}").write_text(str(self.pid))

    SGLangServer.start = started  # type: ignore[method-assign]


def launch_this_script(ranks: int, command: Sequence[str], signals: StopSignals | None) -> int:
    """launch_local with this script in the place of `-m gspo_megatron`."""
    python, *module = command[:3]
    assert module == ["-m", "gspo_megatron"], command
    return launch_local(ranks, [python, __file__, *command[3:]], signals)


if __name__ == "__main__":
    launch_local = launch.launch_local
    if launch.is_rank():
        (FOLDER / f"rank_{os.environ['RANK']}").write_text(str(os.getpid()))
        quiet_libraries()
        record_rollouts()
        leave_guards()
        watch_closely()
        if os.environ["FAULT"] != "none":
            arm(Fault(**json.loads(os.environ["FAULT"])), Path(sys.argv[sys.argv.index("--model.path") + 1]))
    else:
        launch.launch_local = launch_this_script
    sys.exit(cli.main(sys.argv[1:]))
