"""The program's own command, with a SIGKILL armed in one phase of one rollout batch. Started by test_resume.py.

python resume_worker.py COMMAND …, with RESUME_FOLDER and RESUME_RANKS in the environment, and PHASE:BATCH:RANK as KILL,
where RANK is a number or "all"; empty: no kill.

Each process leaves its process id in RESUME_FOLDER. With "all", rank 0 kills the other ranks and the launcher first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron import cli, launch
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.stop import StopSignals

SAVES = ("save", "save_complete", "save_latest")
PHASES = ("rollout", "logprobs", "train", "reshard", *SAVES)


class Strike:
    """Kills this rank, or the whole job, in the phase and batch that it was armed for."""

    def __init__(self, phase: str, batch: int, whom: str) -> None:
        self.phase, self.batch, self.whom = phase, batch, whom
        self.now = 0  # rollout batch that is under way
        self.calls = 0

    def __call__(self, *, victim: int | None = None) -> None:
        """`victim`: this rank's process, if it is not the one that runs this."""
        folder = Path(os.environ["RESUME_FOLDER"])
        (folder / "struck").write_text(f"{self.phase} {self.batch}")
        if self.whom == "all":
            for path in folder.glob("pid_*"):
                number = int(path.read_text())
                if number not in (os.getpid(), victim):
                    _kill(number)
        if victim is not None:
            _kill(victim)
        _kill(os.getpid())

    def due(self, phase: str, *, call: int = 1) -> bool:
        """Whether this call of the phase's function is the one."""
        if self.phase != phase or self.now != self.batch:
            return False
        self.calls += 1
        return self.calls == call


def _kill(number: int) -> None:
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return
    if number == os.getpid():
        time.sleep(60)


def arm(strike: Strike) -> None:
    """Put the strike into the program."""
    quiet_libraries()
    from gspo_megatron import checkpointer, checkpoints, experience, trainer
    from gspo_megatron.policy import policy

    def after(module: Any, name: str, phase: str, call: int = 1) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if strike.due(phase, call=call):
                strike()
            return result

        setattr(module, name, wrapped)

    step = trainer.Trainer.step

    def noted_step(self: Any, batch: int) -> Any:
        strike.now = batch
        return step(self, batch)

    trainer.Trainer.step = noted_step  # type: ignore[method-assign]
    after(experience, "generate", "rollout")  # generated, not scored
    after(policy, "forward_only", "logprobs")  # of the first mini-batch
    after(policy, "forward_backward", "train", call=2)  # one optimizer step is done, the next is under way
    export = policy.MegatronPolicy.export

    def broken_off(self: Any, plan: Any) -> Iterator[Any]:
        for bucket in export(self, plan):
            yield bucket
            if strike.due("reshard"):
                strike()

    policy.MegatronPolicy.export = broken_off  # type: ignore[method-assign]
    _arm_writer(strike, checkpointer, checkpoints)


def _arm_writer(strike: Strike, checkpointer: Any, checkpoints: Any) -> None:
    """Saving happens in a process beside the rank's."""

    def before(module: Any, name: str, phase: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if strike.due(phase):
                strike(victim=os.getppid())
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    write = checkpointer.write_blocks

    def half_written(path: Path, blocks: Sequence[Any], objects: Any) -> Any:
        if strike.due("save"):
            write(path, blocks[: len(blocks) // 2], [])
            strike(victim=os.getppid())
        return write(path, blocks, objects)

    checkpointer.write_blocks = half_written
    before(checkpointer, "write_checksums", "save_complete")
    sync: Callable[[Path], None] = checkpoints._sync_folder

    def before_latest(folder: Path) -> None:
        if folder.name == checkpoints.FOLDER and strike.due("save_latest"):
            strike(victim=os.getppid())
        sync(folder)

    checkpoints._sync_folder = before_latest  # after the renaming, and before the folder's entry is on the disk


def launch_this_script(ranks: int, command: Sequence[str], signals: StopSignals | None) -> int:
    """launch_local with this script in the place of `-m gspo_megatron`."""
    python, *module = command[:3]
    assert module == ["-m", "gspo_megatron"], command
    return launch_local(ranks, [python, __file__, *command[3:]], signals)


if __name__ == "__main__":
    launch_local = launch.launch_local
    if launch.is_rank():
        rank = os.environ["RANK"]
    else:
        rank = "launcher"
        launch.launch_local = launch_this_script
    (Path(os.environ["RESUME_FOLDER"]) / f"pid_{rank}").write_text(str(os.getpid()))
    if os.environ.get("KILL"):
        phase, batch, whom = os.environ["KILL"].split(":")
        is_alone = os.environ["RESUME_RANKS"] == "1"
        if is_alone or rank == ("0" if whom == "all" else whom):
            arm(Strike(phase, int(batch), whom))
    sys.exit(cli.main(sys.argv[1:]))
