"""A benchmark's cells as SLURM array jobs: training runs through `gspo_megatron slurm`, which saves them before a time
limit and comes back; cold starts and measurements one process each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from gspo_megatron.errors import UserError
from gspo_megatron.slurm import command as slurm
from gspo_megatron.slurm.request import parse
from gspo_megatron.slurm.script import render
from gspo_megatron.stability.benchmark.cells import Plan
from gspo_megatron.stability.benchmark.runner import Workplace, command_line
from gspo_megatron.stability.benchmark.spec import Spec

_SINGLE = """#!/bin/bash
# {count} cells of {name}, one process each. Made by tools/stability_benchmark.py.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
{options}
set -euo pipefail
cd {root}
mapfile -t cells < {file}
exec {python} tools/stability_benchmark.py {source} --folder {folder} --cell "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_jobs(spec: Spec, plan: Plan, place: Workplace, out: Path, source: list[str]) -> list[str]:
    """Write the scripts and lists into `out`; returns the lines that say how to submit them.

    Args:
        source: the words that name the benchmark: --preset NAME, or --spec FILE.
    """
    options = spec.needs.get("slurm")
    single = spec.needs.get("sbatch", [])
    if not isinstance(options, str) or not isinstance(single, list):
        raise UserError(
            "[needs] must set slurm, the options of `gspo_megatron slurm` for one training run, e.g. "
            '"--nodes 1 --gpus-per-node 1 --time 04:00:00", and may set sbatch, a list of options of sbatch for one '
            "process"
        )
    out.mkdir(parents=True, exist_ok=True)
    say = []
    for kind in ("sft", "measure"):
        ids = [cell.id for cell in plan.cells.values() if cell.command == kind]
        if ids:
            (out / f"{kind}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
            (out / f"{kind}.sbatch").write_text(
                _SINGLE.format(
                    count=len(ids),
                    name=spec.name,
                    job=f"{spec.name}_{kind}",
                    last=len(ids) - 1,
                    options="\n".join(f"#SBATCH {option}" for option in single),
                    root=shlex.quote(str(place.root)),
                    file=shlex.quote(str(out / f"{kind}.txt")),
                    python=shlex.quote(place.python),
                    source=shlex.join(source),
                    folder=shlex.quote(str(place.folder)),
                ),
                encoding="utf-8",
            )
    cold = (out / "sft.sbatch").is_file()
    if cold:
        say.append(f"cold=$(sbatch --parsable {out / 'sft.sbatch'})")
    after = "--dependency=afterany:$cold " if cold else ""
    if (out / "measure.sbatch").is_file():
        say.append(f"sbatch {after}{out / 'measure.sbatch'}")
    runs = [command_line(spec, cell, place)[4:] for cell in plan.cells.values() if cell.command == "train"]
    if runs:
        lines = [shlex.join(words) for words in runs]
        (out / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments = [spec.train_base, *shlex.split(options), "--array", str(out / "train.txt")]
        arguments += ["--job-name", f"{spec.name}_train", "--python", place.python]
        job = slurm.make_plan(parse(arguments, "tools/stability_benchmark.py --slurm DIR", ""))
        script = render(job, command=["python", "-m", "gspo_megatron", "slurm", *arguments])
        (out / "train.sbatch").write_text(script, encoding="utf-8")
        say.append(f"sbatch {after}{out / 'train.sbatch'}")
    return [*say, f"{sys.argv[0]} {shlex.join(source)} --folder {place.folder} --report-only  # when they have ended"]
