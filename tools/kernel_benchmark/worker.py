"""The measuring process: all candidates of a case in turn for their times, or a single one for its memory.

It is a process of its own so that memory is counted from a clean state and a candidate that brings the process down
is named and left out of the next attempt.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernel_benchmark import linear_candidates, policy_loss, sparse_backward, token_logprobs
from kernel_benchmark.case import Candidate, Case, Prepared, Problem, backward, run
from kernel_benchmark.definition import wrong
from kernel_benchmark.measure import PeakMemory, Probes, Stopwatch, describe_machine

CASES: dict[str, Case[Any]] = {
    case.name: case for case in (token_logprobs.CASE, linear_candidates.CASE, policy_loss.CASE, sparse_backward.CASE)
}
OK, NOT_INSTALLED, WRONG, OUT_OF_MEMORY, FAILED = "ok", "not installed", "wrong", "out of memory", "failed"


@dataclass
class Request:
    """What the parent asks of one process; a JSON file."""

    case: str
    sizes: list[int]
    device: str
    dtype: str
    threads: int
    repetitions: int
    answer: str  # the file to write
    progress: str  # the file that holds the key of the candidate at work
    peers: str | None = None  # a folder of packages, after this interpreter's own
    candidate: str | None = None  # measure this one's memory; None: everybody's times
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Request:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Row:
    """What is known of a candidate. Seconds are one number a repetition."""

    name: str
    objective: str
    ours: bool
    status: str
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    extra_bytes: int | None = None  # beyond the gradients that everybody returns
    peak_bytes: int | None = None  # with them

    @property
    def key(self) -> str:
        return f"{self.objective}: {self.name}"

    @property
    def total_s(self) -> float | None:
        """Median of forward and backward together."""
        if not self.forward_s:
            return None
        return statistics.median(f + b for f, b in zip(self.forward_s, self.backward_s, strict=True))


class Worker:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._case = CASES[request.case]
        self._device = torch.device(request.device)
        self._dtype: torch.dtype = getattr(torch, request.dtype)
        torch.set_num_threads(request.threads)
        if request.peers is not None:
            sys.path.append(request.peers)

    def answer(self) -> dict[str, Any]:
        if self._request.candidate is not None:
            return {"peak_bytes": self.peak_bytes(self._request.candidate)}
        return self.times()

    def candidates(self) -> list[Candidate[Any]]:
        return [
            candidate
            for candidate in self._case.candidates
            if candidate.only_on in (None, self._device.type) and candidate.key not in self._request.left_out
        ]

    def times(self) -> dict[str, Any]:
        machine = describe_machine(self._device)
        problem = self._case.make(tuple(self._request.sizes), self._device, self._dtype)
        rows, ready = [], []
        for candidate in self.candidates():
            row, prepared = self._check(candidate, problem)
            rows.append(row)
            if prepared is not None:
                ready.append((candidate, prepared, row))
        gc.collect()
        gc.disable()
        probes = Probes(problem, self._device, self._dtype)
        for repetition in range(self._request.repetitions):
            probes.measure()
            first = repetition % max(1, len(ready))  # so that nobody always follows the same one
            for candidate, prepared, row in ready[first:] + ready[:first]:
                self._note(candidate)
                self._time(problem, candidate, prepared, row)
        rates = probes.rates()
        return {
            "machine": machine,
            "rates": asdict(rates),
            "floors_s": {name: objective.floors(rates) for name, objective in problem.objectives.items()},
            "result_bytes": problem.result_bytes,
            "probe_bytes": problem.probe_bytes,
            "rows": [asdict(row) for row in rows],
        }

    def _check(self, candidate: Candidate[Any], problem: Problem) -> tuple[Row, Prepared | None]:
        """Its numbers against the definition's; this is its warm-up too."""
        self._note(candidate)
        row = Row(candidate.name, candidate.objective, candidate.ours, OK)
        objective = problem.objectives[candidate.objective]
        problem.restore()
        try:
            prepared = candidate.prepare(problem)
            outputs, gradients = run(prepared, objective.upstream)
            row.errors = objective.errors(outputs, prepared.as_problem(gradients))
            del outputs, gradients
        except ImportError as error:
            row.status, row.note = NOT_INSTALLED, str(error)
            return row, None
        except torch.OutOfMemoryError:
            row.status = OUT_OF_MEMORY
        if mistakes := wrong(row.errors, self._dtype):
            row.status, row.note = WRONG, "; ".join(mistakes)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return row, prepared if row.status == OK else None

    def _time(self, problem: Problem, candidate: Candidate[Any], prepared: Prepared, row: Row) -> None:
        problem.restore()
        watch = Stopwatch(self._device)
        watch.mark()
        outputs = prepared.forward()
        watch.mark()
        backward(prepared, outputs, problem.objectives[candidate.objective].upstream)
        watch.mark()
        forward_s, backward_s = watch.seconds()
        row.forward_s.append(forward_s)
        row.backward_s.append(backward_s)

    def peak_bytes(self, key: str) -> int | None:
        [candidate] = [candidate for candidate in self.candidates() if candidate.key == key]
        self._note(candidate)
        sizes = tuple(self._request.sizes)
        # Code is loaded and libraries are set up at a small size. What a compiler or a tuner needs is not what its
        # result needs: compiled candidates, and all on CUDA, have their warm-up at the size that is measured.
        same_size = candidate.compiled or self._device.type == "cuda"
        problem = self._case.make(sizes if same_size else self._case.small_sizes, self._device, self._dtype)
        prepared = candidate.prepare(problem)
        run(prepared, problem.objectives[candidate.objective].upstream)
        if same_size:
            problem.restore()
        else:
            problem = self._case.make(sizes, self._device, self._dtype)
            prepared = candidate.prepare(problem)
        peak = PeakMemory(self._device)
        results = run(prepared, problem.objectives[candidate.objective].upstream)  # alive until the peak is read
        extra = peak.extra_bytes()
        del results
        return extra

    def _note(self, candidate: Candidate[Any]) -> None:
        Path(self._request.progress).write_text(candidate.key, encoding="utf-8")


def work(path: Path) -> None:
    """Answer the request in the file."""
    request = Request.read(path)
    answer = Worker(request).answer()
    Path(request.answer).write_text(json.dumps(answer), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def environment(request: Request) -> dict[str, str]:
    """Of the process: the number of threads, and for memory an allocator that gives back what is freed."""
    variables = os.environ | {"OMP_NUM_THREADS": str(request.threads), "TOKENIZERS_PARALLELISM": "false"}
    if request.candidate is not None:
        variables |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return variables
