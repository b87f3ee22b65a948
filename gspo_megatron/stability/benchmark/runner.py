"""Running cells as processes: as many at once as fit the cores, each once, across kills of the benchmark itself.

A cell lives in FOLDER/cells/ID: `run` is what its command wrote, `log.txt` what it said, `result.json` its result,
there whole or not at all, or `failed.json`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.cells import Cell, Plan
from gspo_megatron.stability.benchmark.results import FAILURE, RESULT, Result, read_result, read_rows, write_atomically
from gspo_megatron.stability.benchmark.spec import Spec

SPEC_FILE = "benchmark.toml"
MEASUREMENT = "measurement.json"  # what `measure` writes into its run folder
FINISHED = "finished"  # what `train` writes into it at its end
_PR_SET_PDEATHSIG = 1
# A cell that runs this many times as long as estimated, and longer than half an hour, hangs.
TIMEOUT_FACTOR, TIMEOUT_AT_LEAST_S = 10.0, 1800.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Workplace:
    """Where a benchmark runs."""

    folder: Path  # absolute
    root: Path  # of the checkout: paths in configs are relative to it
    python: str = sys.executable

    def cell(self, cell_id: str) -> Path:
        return self.folder / "cells" / cell_id


@dataclass
class Outcome:
    """What became of the cells that were to run."""

    done: int = 0
    failed: list[Cell] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)  # for want of time, or of a cold start
    busy: list[Cell] = field(default_factory=list)  # another process runs them


def claim_folder(spec: Spec, folder: Path) -> None:
    """Make the folder the benchmark's. Raises UserError if it is another's."""
    path = folder / SPEC_FILE
    if path.is_file():
        if path.read_text(encoding="utf-8") != spec.text:
            raise UserError(
                f"{folder} holds a benchmark with another {SPEC_FILE}: hypotheses and rules are fixed before the runs; "
                "give another --folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no benchmark; give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{SPEC_FILE}.{os.getpid()}"
    partial.write_text(spec.text, encoding="utf-8")
    os.replace(partial, path)


def read_results(plan: Plan, place: Workplace) -> dict[str, Result]:
    """Results of the cells that are done."""
    found = {cell_id: read_result(place.cell(cell_id)) for cell_id in plan.cells}
    return {cell_id: result for cell_id, result in found.items() if result is not None}


def read_failures(plan: Plan, place: Workplace) -> dict[str, dict[str, Any]]:
    """What is said of cells that failed the last time they were tried."""
    found = {}
    for cell_id in plan.cells:
        path = place.cell(cell_id) / FAILURE
        if path.is_file():
            found[cell_id] = json.loads(path.read_text(encoding="utf-8"))
    return found


def adopt(plan: Plan, place: Workplace) -> int:
    """Take over training runs that were started otherwise, as by an array job, and have finished; returns how many."""
    count = 0
    for cell in plan.cells.values():
        folder = place.cell(cell.id)
        run = folder / "run"
        if cell.command == "train" and not (folder / RESULT).is_file() and (run / FINISHED).is_file():
            columns = read_rows(run / "metrics.jsonl")
            seconds = sum(x for x in columns.get("time_step_s", []) if x is not None)
            write_atomically(folder / RESULT, {"seconds": seconds, "columns": columns, "values": {}, "curves": {}})
            count += 1
    return count


def estimates(plan: Plan, results: Mapping[str, Result]) -> dict[str, float]:
    """Seconds of each cell: the mean of measured cells that differ in their seed alone, else the spec's guess, scaled
    by how far guesses were off so far."""
    groups: dict[str, list[float]] = {}
    for cell_id, result in results.items():
        groups.setdefault(plan.cells[cell_id].group, []).append(result.seconds)
    guessed = sum(plan.cells[cell_id].seconds for cell_id in results)
    scale = sum(r.seconds for r in results.values()) / guessed if guessed else 1.0
    return {
        cell.id: sum(groups[cell.group]) / len(groups[cell.group]) if cell.group in groups else cell.seconds * scale
        for cell in plan.cells.values()
    }


def model_folder(spec: Spec, name: str, place: Workplace) -> str:
    """The folder of a spec's model: its base, or a copy whose config.json is changed."""
    model = spec.models[name]
    if not model.config:
        return model.base
    folder = place.folder / "models" / name
    if not folder.is_dir():
        base = place.root / model.base
        if not (base / "config.json").is_file():
            raise UserError(f"[models.{name}] base {base} holds no config.json; give a Hugging Face folder")
        partial = folder.with_name(f".{name}.{os.getpid()}")
        shutil.copytree(base, partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8")) | dict(model.config)
        (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        with suppress(OSError):  # another process was first
            os.rename(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def command_line(spec: Spec, cell: Cell, place: Workplace) -> list[str]:
    """The process of a cell."""
    run = place.cell(cell.id) / "run"
    weights = str(place.cell(cell.parent) / "run" / "final") if cell.parent else model_folder(spec, cell.model, place)
    settings = {"run.folder": str(run), "model.path": weights, **cell.settings}
    # A run that was killed goes on from its checkpoint, if it has one; others start anew.
    settings["run.resume" if cell.command == "train" else "run.overwrite"] = True
    words = [place.python, "-m", "gspo_megatron", cell.command, cell.base]
    for key, value in settings.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    lock: IO[str]
    log: IO[bytes]
    start: float
    timeout_s: float
    timed_out: bool = False


def run_cells(
    spec: Spec,
    plan: Plan,
    place: Workplace,
    *,
    slots: int,
    budget_s: float | None = None,
    only: set[str] | None = None,
    timeout_at_least_s: float = TIMEOUT_AT_LEAST_S,
    say: Say = print,
) -> Outcome:
    """Run all cells that have no result yet, `slots` at once, parents first; returns when nothing more can be done.

    Args:
        budget_s: no cell is started that would end, by its estimate, later than this.
        only: ids of the cells to run; None: all.
        timeout_at_least_s: a cell is ended, and has failed, after 10 times its estimate, but not before this.
    """
    results = read_results(plan, place)
    waiting = [c for c in plan.cells.values() if c.id not in results and (only is None or c.id in only)]
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    queue = _Queue(spec, plan, place, slots, deadline, timeout_at_least_s, say, results, waiting, len(waiting))
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        return queue.work_off()
    finally:
        signal.signal(signal.SIGTERM, previous)
        queue.terminate()


@dataclass
class _Queue:
    """The cells of one call of run_cells: those that wait, those that run, and what became of the others."""

    spec: Spec
    plan: Plan
    place: Workplace
    slots: int
    deadline: float  # no cell may end later, by its estimate; math.inf: there is none
    timeout_at_least_s: float
    say: Say
    results: dict[str, Result]
    waiting: list[Cell]
    total: int
    running: list[_Running] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)

    def work_off(self) -> Outcome:
        while self.waiting or self.running:
            self.start_cells()
            self.kill_overdue()
            self.take_results()
            if self.running:
                time.sleep(0.1)
            elif self.next_cell() is None:
                self.outcome.left_out += self.waiting
                self.waiting = []
        self.outcome.busy = [c for c in self.outcome.busy if read_result(self.place.cell(c.id)) is None]
        return self.outcome

    def next_cell(self) -> tuple[Cell, float] | None:
        """The first cell that can start, with its estimate: its cold start is done, and it would end in time."""
        guess = estimates(self.plan, self.results)
        left = self.deadline - time.monotonic()
        for cell in self.waiting:
            if (not cell.parent or cell.parent in self.results) and guess[cell.id] <= left:
                return cell, guess[cell.id]
        return None

    def start_cells(self) -> None:
        while len(self.running) < self.slots and (found := self.next_cell()) is not None:
            cell, seconds = found
            self.waiting.remove(cell)
            started = _start(self.spec, cell, self.place, max(self.timeout_at_least_s, TIMEOUT_FACTOR * seconds))
            if isinstance(started, Result):
                self.results[cell.id] = started
                self.total -= 1
            elif started is None:
                self.outcome.busy.append(cell)
            else:
                self.running.append(started)

    def kill_overdue(self) -> None:
        for job in self.running:
            if not job.timed_out and time.monotonic() - job.start > job.timeout_s:
                job.timed_out = True
                job.process.kill()

    def take_results(self) -> None:
        for job in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(job)
            result = _finish(job, self.place)
            if result is None:
                self.outcome.failed.append(job.cell)
            else:
                self.results[job.cell.id] = result
                self.outcome.done += 1
            word = "FAILED" if result is None else "done"
            count = self.outcome.done + len(self.outcome.failed)
            self.say(f"[{count}/{self.total}] {word} in {time.monotonic() - job.start:.0f} s: {job.cell.title}")

    def terminate(self) -> None:
        """End what still runs, if the benchmark is interrupted."""
        for job in self.running:
            job.process.terminate()
        for job in self.running:
            try:
                job.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _start(spec: Spec, cell: Cell, place: Workplace, timeout_s: float) -> _Running | Result | None:
    """The cell's process; its result if another benchmark has just written one; None if another has the cell. The lock
    is the child's as well, so that it holds as long as either lives."""
    folder = place.cell(cell.id)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    if (done := read_result(folder)) is not None:
        lock.close()
        return done
    (folder / FAILURE).unlink(missing_ok=True)
    words = command_line(spec, cell, place)
    write_atomically(folder / "cell.json", {"title": cell.title, "command": words, "settings": cell.settings})
    log = (folder / "log.txt").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place.root), environment.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        words,
        cwd=place.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],
        preexec_fn=functools.partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
    )
    return _Running(cell, process, lock, log, time.monotonic(), timeout_s)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with(parent: int) -> None:
    """In the child: the kernel kills it when the benchmark dies, even by SIGKILL."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _finish(job: _Running, place: Workplace) -> Result | None:
    """Write down what the ended process came to; None if it failed."""
    seconds = time.monotonic() - job.start
    job.log.close()
    folder = place.cell(job.cell.id)
    code = job.process.returncode
    try:
        if job.timed_out:
            _fail(
                folder,
                f"ended after {seconds:.0f} s, more than {TIMEOUT_FACTOR:g} times its estimate; if it did not hang, "
                "raise `seconds` of its grid, or sft_seconds",
            )
            return None
        if code:
            _fail(folder, f"exit code {code}")
            return None
        try:
            write_atomically(folder / RESULT, _collect(job.cell, folder / "run", seconds))
        except (OSError, ValueError, KeyError) as error:
            _fail(folder, f"its records can't be read: {error!r}")
            return None
        return read_result(folder)
    finally:
        job.lock.close()


def _fail(folder: Path, reason: str) -> None:
    tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
    write_atomically(folder / FAILURE, {"reason": reason, "log": tail})


def _collect(cell: Cell, run: Path, seconds: float) -> dict[str, Any]:
    data: dict[str, Any] = {"seconds": seconds, "columns": {}, "values": {}, "curves": {}}
    if cell.command == "measure":
        data |= json.loads((run / MEASUREMENT).read_text(encoding="utf-8"))
    else:
        data["columns"] = read_rows(run / "metrics.jsonl")
    return data
