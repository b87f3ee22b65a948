"""SIGTERM, SIGUSR1 and the deadline: saved within one rollout batch, exit code 75 on every rank, and on it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from gspo_megatron import checkpoints
from tests.distributed.rank_pool import free_port
from tests.system.test_resume import FOUR, ONE, ROOT, SETTINGS

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
LIMIT_S = 240.0  # to start, and to stop
MANY = "100000"  # rollout batches: more than a test waits for


class Job:
    """`train` in a folder, as one command or as ranks that a scheduler has started."""

    def __init__(self, folder: Path, layout: dict[str, int], **settings: str) -> None:
        self.folder = folder
        values = SETTINGS | {"run.folder": str(folder), "train.rollout_batches": MANY, "checkpoint.every": "0"}
        values |= {f"parallel.{name}": str(degree) for name, degree in layout.items()} | settings
        overrides = [word for name, value in values.items() for word in (f"--{name}", value)]
        self.command = ["-m", "gspo_megatron", "train", "examples/quickstart/gspo.toml", *overrides]
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, program: Sequence[str] = (sys.executable,), **environment: str) -> subprocess.Popen[str]:
        known = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            [*program, *self.command],
            cwd=ROOT,
            env=known
            | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def start_ranks(self, ranks: int) -> None:
        """As srun does: one process a rank, without a launcher."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            self.start(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), **common)

    def rows(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def wait_for_rows(self, count: int) -> int:
        """Wait until so many rows are written; returns the batches that are done."""
        deadline = time.monotonic() + LIMIT_S
        while self.rows() < count:
            assert all(p.poll() is None for p in self.processes), self.output()
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.02)
        return self.rows() - 1

    def wait(self) -> list[int]:
        """Exit codes."""
        return [process.wait(LIMIT_S) for process in self.processes]

    def output(self) -> str:
        return "\n".join(p.stdout.read() for p in self.processes if p.stdout is not None)

    def check_saved(self, before: int, *, slack: int = 1) -> int:
        """The newest checkpoint is of the batch that was under way, whole, and the last one recorded."""
        newest = checkpoints.complete(self.folder)[0]
        batch = checkpoints.batch_of(newest)
        assert before <= batch <= before + slack
        assert self.rows() == batch + 1
        assert checkpoints.damage(newest) == []
        return batch


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGUSR1, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        (signal.SIGTERM, 4),
        pytest.param(signal.SIGUSR1, 4, marks=pytest.mark.slow),
    ],
)
def test_every_rank_leaves_with_75(number: signal.Signals, ranks: int, tmp_path: Path) -> None:
    """One rank of those that a scheduler has started is signalled."""
    job = Job(tmp_path / "run", ONE if ranks == 1 else FOUR)
    job.start_ranks(ranks)
    before = job.wait_for_rows(3)
    job.processes[-1].send_signal(number)
    assert job.wait() == [75] * ranks, job.output()
    # The signal may come at the end of a batch, when its row is not written yet.
    job.check_saved(before, slack=2 if ranks == 1 else 1)
    assert f"stopped on {number.name} after rollout batch" in job.output()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "number"),
    [("launcher", signal.SIGUSR1), ("launcher", signal.SIGTERM), ("everything", signal.SIGUSR1)],
)
def test_the_launcher_passes_signals_on(to: str, number: signal.Signals, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", FOUR)
    launcher = job.start()
    before = job.wait_for_rows(2)
    processes = [psutil.Process(launcher.pid)]
    if to == "everything":  # as SLURM signals a step
        processes += processes[0].children(recursive=True)
        assert len(processes) >= 5
    for process in processes:
        process.send_signal(number)
    assert job.wait() == [75], job.output()
    batch = job.check_saved(before)
    again = Job(tmp_path / "run", FOUR, **{"train.rollout_batches": str(batch + 1)})
    again.start()
    assert again.wait() == [0], again.output()
    assert again.rows() == batch + 2 and (tmp_path / "run" / "final").is_dir()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", ONE, **{"checkpoint.every": "1", "rollout.prompts_per_batch": "4096"})
    process = job.start()
    job.wait_for_rows(1)
    time.sleep(2)  # into the first batch, which takes a minute
    process.send_signal(signal.SIGUSR1)
    time.sleep(2.5)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1 and time.monotonic() - start < 2
    assert "SIGTERM, the second signal: ends at once, without saving" in job.output()
    assert not checkpoints.complete(tmp_path / "run")


@pytest.mark.slow
def test_the_deadline_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    batches = []
    for _ in range(2):
        job = Job(tmp_path / "run", ONE, **{"checkpoint.deadline_s": "2"})
        job.start()
        assert job.wait() == [75]
        batches.append(job.check_saved(1, slack=10**6))
    assert 0 < batches[0] < batches[1]


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_and_they_resume(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", {"tensor": 2, "expert": 2}, **{"checkpoint.every": "1", "train.rollout_batches": "12"})
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d"]
    launcher = job.start([sys.executable, "-m", *torchrun, "--rdzv-endpoint=127.0.0.1:0"])
    job.wait_for_rows(4)
    ranks = [p for p in psutil.Process(launcher.pid).children() if "gspo_megatron" in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    assert job.wait() == [0], job.output()
    assert "resuming from" in job.output() and job.rows() == 13
