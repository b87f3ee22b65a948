"""Cells as processes: once each, across failures and kills."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gspo_megatron.errors import UserError
from gspo_megatron.stability.benchmark.runner import (
    adopt,
    claim_folder,
    estimates,
    read_failures,
    read_results,
    run_cells,
)
from tests.unit.stability.benchmark.benchmark_setup import SPEC, calls, workplace, write_root

ROOT = Path(__file__).parents[4]


def quiet(text: str) -> None:
    pass


def test_every_cell_runs_once(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    outcome = run_cells(spec, plan, place, slots=2, say=quiet)
    assert outcome.done == 8 and not outcome.failed and len(calls(tmp_path)) == 8
    assert set(read_results(plan, place)) == set(plan.cells)
    again = run_cells(spec, plan, place, slots=2, say=quiet)
    assert again.done == 0 and len(calls(tmp_path)) == 8
    assert read_results(plan, place)[list(plan.cells)[1]].columns["reward_mean"] == [0.5] * 3, "the start is no batch"


def test_a_failed_cell_is_reported_others_go_on_and_it_is_tried_again(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    (tmp_path / "broken").touch()
    outcome = run_cells(spec, plan, place, slots=2, say=quiet)
    assert outcome.done == 6 and len(outcome.failed) == 2
    failures = read_failures(plan, place)
    assert {plan.cells[c].settings["algorithm.name"] for c in failures} == {"grpo"}
    assert all(f["reason"] == "exit code 1" and "grpo is broken" in f["log"][-1] for f in failures.values())
    (tmp_path / "broken").unlink()
    assert run_cells(spec, plan, place, slots=2, say=quiet).done == 2
    assert not read_failures(plan, place) and len(calls(tmp_path)) == 10


def test_cells_without_their_cold_start_are_left_out(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    trains = {c.id for c in plan.cells.values() if c.command == "train"}
    outcome = run_cells(spec, plan, workplace(tmp_path), slots=2, only=trains, say=quiet)
    assert len(outcome.left_out) == 6 and calls(tmp_path) == []


def test_nothing_is_started_that_would_end_after_the_budget(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    # Guesses: a cold start 60 s, a run 10 s. Nothing fits in 5 s; cold starts do not fit in 30 s.
    assert len(run_cells(spec, plan, place, slots=2, budget_s=5, say=quiet).left_out) == 8
    assert calls(tmp_path) == []
    assert run_cells(spec, plan, place, slots=2, budget_s=61, say=quiet).done == 8


def test_estimates_learn_from_what_was_measured(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    run_cells(spec, plan, place, slots=2, say=quiet, only={c.id for c in plan.cells.values() if "11" in c.title})
    results = read_results(plan, place)
    guess = estimates(plan, results)
    for cell in plan.cells.values():
        twins = [r.seconds for i, r in results.items() if plan.cells[i].group == cell.group]
        assert guess[cell.id] == pytest.approx(sum(twins) / len(twins)), "a cell of another seed was measured"


def test_a_killed_benchmark_takes_its_cells_along_and_goes_on(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    (tmp_path / "slow").touch()
    code = (
        "import sys; from pathlib import Path; from tests.unit.stability.benchmark import benchmark_setup as s;"
        "from gspo_megatron.stability.benchmark.runner import run_cells;"
        "root = Path(sys.argv[1]); run_cells(*s.write_root(root), s.workplace(root), slots=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any("grpo" in line for line in calls(tmp_path)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    numbers = [int(line.split()[0]) for line in (tmp_path / "calls.txt").read_text().splitlines() if "grpo" in line]
    while any(psutil.pid_exists(n) and psutil.Process(n).status() != "zombie" for n in numbers):
        assert time.monotonic() < deadline, "a cell outlived the benchmark"
        time.sleep(0.05)
    before = read_results(plan, place)
    assert before and len(before) < 8
    (tmp_path / "slow").unlink()
    ran = len(calls(tmp_path))
    outcome = run_cells(spec, plan, place, slots=2, say=quiet)
    assert outcome.done == 8 - len(before) == len(calls(tmp_path)) - ran, "what was done is not run again"
    assert set(read_results(plan, place)) == set(plan.cells)


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    first = next(iter(plan.cells))
    place.cell(first).mkdir(parents=True)
    with (place.cell(first) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = run_cells(spec, plan, place, slots=2, only={first}, say=quiet)
    assert [cell.id for cell in outcome.busy] == [first] and calls(tmp_path) == []


def test_what_another_process_has_done_meanwhile_is_not_run_again(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    ran: list[int] = []

    def other_benchmark(text: str) -> None:
        """Runs everything while the first cell's end is told."""
        if not ran:
            ran.append(run_cells(spec, plan, place, slots=2, say=quiet).done)

    outcome = run_cells(spec, plan, place, slots=1, say=other_benchmark)
    assert outcome.done == 1 and ran == [7] and not outcome.left_out and len(calls(tmp_path)) == 8


def test_a_cell_that_another_process_has_ended_by_then_is_not_called_busy(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    leaf = next(cell for cell in plan.cells.values() if cell.parent)
    run_cells(spec, plan, place, slots=1, only={leaf.parent}, say=quiet)
    place.cell(leaf.id).mkdir(parents=True)
    lock = (place.cell(leaf.id) / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def other_benchmark(text: str) -> None:
        if not lock.closed:
            lock.close()
            assert run_cells(spec, plan, place, slots=1, only={leaf.id}, say=quiet).done == 1

    outcome = run_cells(spec, plan, place, slots=1, say=other_benchmark)
    assert lock.closed and outcome.busy == [] and not outcome.failed


def test_a_cell_that_hangs_has_failed_with_a_remedy(tmp_path: Path) -> None:
    spec, plan = write_root(tmp_path, SPEC.replace("seconds = 10 }", "seconds = 0.01 }"))
    place = workplace(tmp_path)
    (tmp_path / "slow").touch()  # 60 s under GRPO
    start = time.monotonic()
    outcome = run_cells(spec, plan, place, slots=2, timeout_at_least_s=3.0, say=quiet)
    assert {c.settings["algorithm.name"] for c in outcome.failed} == {"grpo"} and time.monotonic() - start < 40
    failure = next(iter(read_failures(plan, place).values()))
    assert "times its estimate" in failure["reason"] and "raise `seconds`" in failure["reason"]


def test_a_folder_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    spec, _ = write_root(tmp_path)
    claim_folder(spec, tmp_path / "runs")
    claim_folder(spec, tmp_path / "runs")
    other, _ = write_root(tmp_path, SPEC.replace("The one.", "The other one."))
    with pytest.raises(UserError, match="fixed before the runs"):
        claim_folder(other, tmp_path / "runs")
    with pytest.raises(UserError, match="holds no benchmark"):
        claim_folder(spec, tmp_path)


def test_finished_runs_of_an_array_job_are_taken_over(tmp_path: Path) -> None:
    _, plan = write_root(tmp_path)
    place = workplace(tmp_path)
    cell = plan.find("first", {"arm": "gspo", "seed": 11})[0].cell
    run = place.cell(cell.id) / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.25, "time_step_s": 2.0}\n')
    assert adopt(plan, place) == 0, "it has not finished"
    (run / "finished").write_text("1")
    assert adopt(plan, place) == 1
    found = read_results(plan, place)[cell.id]
    assert found.seconds == 2.0 and found.columns["reward_mean"] == [0.25]
