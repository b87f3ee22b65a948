"""The program's own command, with a fault armed on one rank. Started by test_faults.py.

python fault_worker.py COMMAND …, with FAULT, FAULT_RANK and FAULT_FOLDER in the environment

The fault strikes inside the last transformer layer of its rank, at the second micro-batch of the first training
step. Each rank leaves its process id in FAULT_FOLDER, and the rank at fault the time just before it strikes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_megatron import cli, launch
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.stop import StopSignals

MICRO_BATCH = 2  # the first has gone through forward and backward, or through forward in a pipeline
MESSAGE = "the experts of this rank broke"


def strike(fault: str, micro_batches: int) -> None:
    """Let the fault happen now."""
    folder = Path(os.environ["FAULT_FOLDER"])
    (folder / "struck_at").write_text(f"{time.time()} {micro_batches}")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)
    raise ArithmeticError(MESSAGE)


def arm(fault: str) -> None:
    """Put the fault into the first training step of this process."""
    quiet_libraries()
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from gspo_megatron.policy.policy import MegatronPolicy

    train_step = MegatronPolicy.train_step

    def armed_step(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        MegatronPolicy.train_step = train_step  # type: ignore[method-assign]
        layer = [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, TransformerLayer)][-1]
        passes = 0

        def after_forward(module: Any, inputs: Any, output: Any) -> None:
            nonlocal passes
            passes += 1
            if passes != MICRO_BATCH:
                return
            if fault == "raise_in_forward":
                strike(fault, len(batch.micro_batches))
            output[0].register_hook(lambda gradient: strike(fault, len(batch.micro_batches)))

        layer.register_forward_hook(after_forward)
        return train_step(self, batch, *args, **kwargs)

    MegatronPolicy.train_step = armed_step  # type: ignore[method-assign]


def launch_this_script(ranks: int, command: Sequence[str], signals: StopSignals | None) -> int:
    """launch_local with this script in the place of `-m gspo_megatron`."""
    python, *module = command[:3]
    assert module == ["-m", "gspo_megatron"], command
    return launch_local(ranks, [python, __file__, *command[3:]], signals)


if __name__ == "__main__":
    launch_local = launch.launch_local
    if launch.is_rank():
        rank = os.environ["RANK"]
        (Path(os.environ["FAULT_FOLDER"]) / f"pid_{rank}").write_text(str(os.getpid()))
        if rank == os.environ["FAULT_RANK"]:
            arm(os.environ["FAULT"])
    else:
        launch.launch_local = launch_this_script
    sys.exit(cli.main(sys.argv[1:]))
