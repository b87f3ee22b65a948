"""GSPO against other arms on Mixture-of-Experts models: experiments whose hypotheses and verdict rules were written
before the runs, at the scale of a preset. Goes on where it was ended, with the same command.

    python tools/stability_benchmark.py --preset laptop                    # 45 minutes on 2 cores
    python tools/stability_benchmark.py --preset laptop --plan             # its cells and their time
    python tools/stability_benchmark.py --preset h200 --check              # would it work?
    python tools/stability_benchmark.py --preset cluster --slurm jobs      # as SLURM arrays

docs/stability.md explains the experiments and the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stability import environment

from gspo_megatron.errors import UserError, nearest
from gspo_megatron.stability.benchmark import page, report, runner
from gspo_megatron.stability.benchmark.cells import Plan, make_plan
from gspo_megatron.stability.benchmark.runner import Outcome, Workplace
from gspo_megatron.stability.benchmark.spec import Spec, read_spec

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "examples" / "stability"
DONE, INCOMPLETE, WRONG_INPUT, STOPPED = 0, 1, 2, 75


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", help=f"a file of examples/stability: {', '.join(_presets())}")
    source.add_argument("--spec", type=Path, metavar="FILE", help="a file of your own")
    parser.add_argument("--folder", type=Path, help="cells and report; default runs/stability/NAME")
    parser.add_argument("--experiment", action="append", default=[], metavar="NAME", help="this one alone; may repeat")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="cells at once; default: [needs] or the cores")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="start no cell that would end later")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--plan", action="store_true", help="print the cells and their estimated time")
    action.add_argument("--check", action="store_true", help="hold every kind of cell against the config's checks")
    action.add_argument("--report-only", action="store_true", help="report on what is there")
    action.add_argument("--slurm", type=Path, metavar="DIR", help="write SLURM array jobs into DIR")
    action.add_argument("--cell", metavar="ID", help="run one cell, as array jobs do")
    options = parser.parse_args(arguments)
    if options.jobs < 0 or (options.budget_minutes is not None and not options.budget_minutes >= 0):
        raise UserError(f"--jobs {options.jobs} and --budget-minutes {options.budget_minutes} must not be negative")
    return options


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def spec_path(options: argparse.Namespace) -> Path:
    if options.spec is not None:
        return options.spec
    if options.preset not in _presets():
        hint = nearest(options.preset, _presets())
        raise UserError(f'--preset "{options.preset}" is unknown; use one of {", ".join(_presets())}.{hint}')
    return PRESETS / f"{options.preset}.toml"


@dataclass(frozen=True)
class Benchmark:
    """A spec with its cells and its folder."""

    spec: Spec
    plan: Plan
    place: Workplace

    def chosen(self, names: Sequence[str]) -> set[str] | None:
        """Ids of the cells of these experiments and of their cold starts; None: all."""
        for name in names:
            if name not in self.plan.experiments:
                known = self.plan.experiments
                hint = nearest(name, known)
                raise UserError(f'--experiment "{name}" is unknown; use {", ".join(known)}.{hint}')
        cells = [placed.cell for name in names for placed in self.plan.experiments[name]]
        return {i for cell in cells for i in (cell.id, cell.parent) if i} or None

    def report(self) -> None:
        results = runner.read_results(self.plan, self.place)
        failures = runner.read_failures(self.plan, self.place)
        facts = environment.of_report(self.place.folder, ROOT)
        facts |= {f"needs {key}": str(value) for key, value in self.spec.needs.items()}
        paths, verdicts = report.write_report(
            self.spec, self.plan, results, failures, facts, self.place.folder / "report"
        )
        for verdict in verdicts:
            print(f"{verdict.verdict:<13}{page.interval(verdict):<34}{verdict.claim.text}")
        print(page.summary(verdicts), *paths, sep="\n")


def print_plan(benchmark: Benchmark, only: set[str] | None, slots: int) -> None:
    results = runner.read_results(benchmark.plan, benchmark.place)
    guess = runner.estimates(benchmark.plan, results)
    total = 0.0
    for cell in benchmark.plan.cells.values():
        if only is None or cell.id in only:
            done = cell.id in results
            total += 0 if done else guess[cell.id]
            print(f"{cell.id:<22}{'done' if done else f'{guess[cell.id]:.0f} s':>7}  {cell.title}")
    gpus = benchmark.spec.needs.get("gpus")  # may be in words
    if (
        benchmark.spec.cells_at_once == 0 and isinstance(gpus, int) and gpus > 0
    ):  # jobs of a cluster, of this many GPUs each
        print(f"about {total / 3600:.0f} hours of {gpus} GPUs left")
    else:
        print(f"about {total / 60:.0f} minutes of one process left, {total / 60 / slots:.0f} with {slots} at once")
    for key, value in benchmark.spec.needs.items():
        print(f"needs {key}: {value}")


def describe(outcome: Outcome, budget: float | None) -> None:
    for cell in outcome.failed:
        print(f"failed: {cell.title}; see cells/{cell.id}/log.txt. The same command tries it again", file=sys.stderr)
    if outcome.left_out:
        late = "" if budget is None else f"would end after {budget:g} minutes, or "
        why = f"they {late}wait for a cold start that is not done"
        print(f"{len(outcome.left_out)} cells were not started: {why}; the same command goes on", file=sys.stderr)
    if outcome.busy:
        print(
            f"{len(outcome.busy)} cells are run by another process; the same command reports on them later",
            file=sys.stderr,
        )


def run(options: argparse.Namespace) -> int:
    spec = read_spec(spec_path(options), ROOT)
    plan = make_plan(spec, ROOT)
    folder = options.folder or Path("runs") / "stability" / spec.name
    benchmark = Benchmark(spec, plan, Workplace(folder.resolve(), ROOT))
    only = benchmark.chosen(options.experiment)
    slots = options.jobs or spec.cells_at_once or os.cpu_count() or 1
    if options.plan:
        print_plan(benchmark, only, slots)
        return DONE
    if options.check:
        from stability.check import check

        print(*check(spec, plan, ROOT), sep="\n")
        print(*(f"needs {key}: {value}" for key, value in spec.needs.items()), sep="\n")
        return DONE
    runner.claim_folder(spec, benchmark.place.folder)
    runner.adopt(plan, benchmark.place)
    if options.slurm:
        from stability.slurm import write_jobs

        source = ["--preset", options.preset] if options.preset else ["--spec", str(options.spec.resolve())]
        print(*write_jobs(spec, plan, benchmark.place, options.slurm.resolve(), source), sep="\n")
        return DONE
    if options.cell:
        if options.cell not in plan.cells:
            raise UserError(f"--cell {options.cell} is no cell of {spec.name}; --plan lists them")
        only = {options.cell}
    outcome = Outcome()
    if not options.report_only:
        environment.record(benchmark.place.folder, ROOT)
        budget = options.budget_minutes if options.budget_minutes is not None else spec.budget_minutes or None
        budget_s = None if budget is None or options.cell else 60 * budget
        outcome = runner.run_cells(spec, plan, benchmark.place, slots=slots, budget_s=budget_s, only=only)
        describe(outcome, budget)
    if not options.cell:
        benchmark.report()
    return INCOMPLETE if outcome.failed or outcome.left_out or outcome.busy else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:  # a disk that is full, a folder that can't be written
        print(f"error: {error}; what is done is kept, and the same command goes on", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    raise SystemExit(main())
