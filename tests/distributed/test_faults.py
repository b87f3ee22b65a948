"""A real training step on four ranks in which one rank raises or hangs: all end, and the cause is named.

A rank that is killed, and one in the middle of a pipeline: tests/system/test_faults.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # all jobs run in the first test's setup

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("fault_worker.py")
RANKS = 4
JOB_LIMIT_S = 240.0  # a job that is still there then is ended, and its test fails
LIMIT_S = 60.0  # from the fault to the end of the job; it takes 2 s
LONG_TIMEOUT_S = 180.0  # of collectives, where they are not what ends the ranks
# Also the longest that one rank may be behind another while they start: no machine is that slow.
HANG_TIMEOUT_S = 30.0
HANG_LIMIT_S = HANG_TIMEOUT_S + 30  # a timeout rounded up to the next minute is over it

TENSOR_DATA = {"tensor": 2, "expert": 2, "data": 2}
TENSOR_STAGES = {"tensor": 2, "expert": 1, "pipeline": 2}
TINY = {
    "model.init": "random",
    "task.reward_threshold": "null",  # partial credit: random weights must have rewards that differ
    "algorithm.mini_batches": "1",
    "rollout.prompts_per_batch": "8",
    "rollout.samples_per_prompt": "4",
    "rollout.max_response_tokens": "8",
    "data.token_budget": "64",
    "train.rollout_batches": "1",
    "eval.every": "0",
    "eval.prompts": "2",
}


@dataclass(frozen=True)
class Case:
    """A fault, where it strikes, and how long collectives wait."""

    fault: str
    rank: int
    layout: dict[str, int]
    timeout_s: float = LONG_TIMEOUT_S


CASES = {
    "raise_in_backward": Case("raise_in_backward", 3, TENSOR_DATA),
    "hang": Case("hang", 3, TENSOR_STAGES, HANG_TIMEOUT_S),
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int | None  # None: it had to be ended
    stderr: str
    micro_batches: int  # of the step in which the fault struck; 0 if it never did
    after_s: float  # from the fault to the end of the job
    survivors: list[int]  # ranks whose process outlived the job


class FaultyJob:
    """`train` as a user runs it, on a tiny random model, with a fault in one rank."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder = folder
        model = shutil.copytree(ROOT / "examples" / "quickstart" / "model", folder / "model")
        config = json.loads((model / "config.json").read_text())
        config["num_hidden_layers"] = 4  # one a pipeline stage
        (model / "config.json").write_text(json.dumps(config))
        settings = TINY | {
            "run.folder": str(folder / "run"),
            "model.path": str(model),
            "parallel.timeout_s": str(case.timeout_s),
            **{f"parallel.{name}": str(degree) for name, degree in case.layout.items()},
        }
        overrides = [word for name, value in settings.items() for word in (f"--{name}", value)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "FAULT": case.fault,
            "FAULT_RANK": str(case.rank),
            "FAULT_FOLDER": str(folder),
        }
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), "train", "examples/quickstart/gspo.toml", *overrides],
                cwd=ROOT,
                env=environment,
                stdout=stdout,
                stderr=stderr,
            )
        self.deadline = time.monotonic() + JOB_LIMIT_S

    @property
    def struck(self) -> bool:
        return (self.folder / "struck_at").exists()

    def wait(self) -> Outcome:
        """Wait for the end; nothing of the job is left afterwards."""
        while self.process.poll() is None and time.monotonic() < self.deadline:
            time.sleep(0.1)
        exit_code = self.process.poll()
        ended_at = time.time()
        survivors = {rank: process for rank in range(RANKS) if (process := self._rank(rank)) is not None}
        for process in [*survivors.values(), self.process]:
            process.kill()
        self.process.wait()
        at, micro_batches = (self.folder / "struck_at").read_text().split() if self.struck else ("0", "0")
        stderr = (self.folder / "stderr").read_text()
        return Outcome(exit_code, stderr, int(micro_batches), ended_at - float(at), sorted(survivors))

    def _rank(self, rank: int) -> psutil.Process | None:
        """The rank's process, if it is still there."""
        try:
            process = psutil.Process(int((self.folder / f"pid_{rank}").read_text()))
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.NoSuchProcess:
            return None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All jobs' ends. The other jobs run while the hanging one waits for its timeout, which costs nothing."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        hanging = FaultyJob(CASES["hang"], tmp_path_factory.mktemp("hang"))
        hang = pool.submit(hanging.wait)
        while not hang.done() and not hanging.struck:
            time.sleep(0.1)
        others = {name: case for name, case in CASES.items() if name != "hang"}
        ends = {name: FaultyJob(case, tmp_path_factory.mktemp(name)).wait() for name, case in others.items()}
        return ends | {"hang": hang.result()}


def check_ended(outcome: Outcome, *, limit_s: float = LIMIT_S) -> None:
    """All ranks ended in time, in a step that was under way, with the exit code of a failure."""
    assert outcome.micro_batches > 2, f"the fault must strike in mid-step:\n{outcome.stderr}"
    assert outcome.exit_code == 1, outcome.stderr
    assert outcome.survivors == []
    assert outcome.after_s < limit_s


def check_only_error(stderr: str, rank: int) -> None:
    """The error of the rank that raised is shown, once, and no other."""
    lines = stderr.splitlines()
    assert lines[0] == f"rank {rank} of 4 failed first: ArithmeticError: the experts of this rank broke"
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "ArithmeticError: the experts of this rank broke"
    assert sum(line.startswith("Traceback") for line in lines) == 1


def test_a_rank_that_raises_in_the_backward_pass(outcomes: dict[str, Outcome]) -> None:
    check_ended(outcomes["raise_in_backward"])
    check_only_error(outcomes["raise_in_backward"].stderr, CASES["raise_in_backward"].rank)


def test_a_hanging_rank_is_pointed_at(outcomes: dict[str, Outcome]) -> None:
    """The first error is of a rank that waited; it says which rank was not waiting, and where that one is."""
    check_ended(outcomes["hang"], limit_s=HANG_LIMIT_S)
    stderr = outcomes["hang"].stderr
    first, second, *rest = stderr.splitlines()
    assert "of 4 failed first: RuntimeError: " in first and "Timed out" in first
    assert not first.startswith("rank 3")
    assert "no error came from rank 3: the cause is probably there" in second
    assert rest[0] == "rank 3 was at:"
    stack = stderr.split("rank 3 was at:\n")[1].split("Traceback")[0]
    assert "time.sleep" in stack and "backward_step" in stack
    assert stderr.count("was at:") == stderr.count("Traceback") == 1
