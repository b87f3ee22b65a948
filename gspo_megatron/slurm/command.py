"""`python -m gspo_megatron slurm`: plan a job, print, write or submit its script."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gspo_megatron import config_io
from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.slurm.plan import JobPlan, Run, plan_job
from gspo_megatron.slurm.request import Arguments, parse, read_array
from gspo_megatron.slurm.script import render

PROGRAM = "python -m gspo_megatron slurm"


def run(arguments: Sequence[str], *, usage: str, summary: str) -> None:
    """Plan the job that the command line describes, and do with its script what is asked.

    Args:
        arguments: of `slurm`.
        usage: for messages, with the program's name.
        summary: what the command does.

    Raises:
        UserError: the config, the options or both together can't work; sbatch is missing or refuses the job.
    """
    options = parse(arguments, usage, summary)
    plan = make_plan(options)
    script = render(plan, command=[*PROGRAM.split(), *_without_action(arguments)])
    if options.output is not None:
        _write(options.output, script, overwrite=options.overwrite)
    if options.submit:
        job = _submit(script)
        print(plan.describe(), f"submitted as job {job}", sep="\n")
    elif options.output is not None:
        print(plan.describe(), f"written to {options.output}; submit it with: sbatch {options.output}", sep="\n")
    else:
        print(plan.describe(), file=sys.stderr)
        print(script, end="", flush=True)


def make_plan(options: Arguments) -> JobPlan:
    """The job of a command line; reads the config files that it names, and the models if they are here."""
    runs = _read_runs(options)
    plan = plan_job(runs, options.request, is_array=options.array is not None)
    warnings = list(plan.warnings)
    for number, run in enumerate(runs, start=1):
        with _naming(options, number):
            warnings += _check(run)
    return dataclasses.replace(plan, warnings=tuple(dict.fromkeys(warnings)))


def _read_runs(options: Arguments) -> list[Run]:
    if options.array is None:
        return [_load(options.config, options.overrides)]
    runs = []
    for number, words in enumerate(read_array(options.array), start=1):
        is_file = not words[0].startswith("--")
        config = Path(words[0]) if is_file else options.config
        with _naming(options, number):
            runs.append(_load(config, (*options.overrides, *words[int(is_file) :])))
    return runs


@contextlib.contextmanager
def _naming(options: Arguments, number: int) -> Iterator[None]:
    """Let an error say which run of an array it is about."""
    try:
        yield
    except UserError as error:
        if options.array is None:
            raise
        raise UserError(f"--array {options.array}, run {number}: {error}") from None


def _check(run: Run) -> list[str]:
    """What is doubtful about a run; raises UserError for what can't work on any machine."""
    from gspo_megatron import preflight

    model = run.config.model.path
    if not (Path(model) / "config.json").is_file():
        return [f"model.path={model} is not on this machine: the layout was not held against the model"]
    # A run that is there already is gone on with.
    return preflight.check_train(run.config, folder=False, here=False).warnings


def _load(path: Path, overrides: Sequence[str]) -> Run:
    if "sft" in config_io.read_toml(path):
        raise UserError(f"{path} is a config of sft, which can't be resumed; slurm makes jobs of train")
    config = config_io.load_config(TrainConfig, path, overrides)
    # As the job will run it: what does not go with it is refused now.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    return Run(path, tuple(overrides), config)


def _without_action(arguments: Sequence[str]) -> list[str]:
    """The arguments that make the script what it is."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--output":
            rest = rest[1:]
        elif word not in ("--dry-run", "--overwrite", "--submit") and not word.startswith("--output="):
            kept.append(word)
    return kept


def _write(path: Path, script: str, *, overwrite: bool) -> None:
    try:
        with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(script)
    except FileExistsError:
        raise UserError(f"--output {path} exists; give another file, or --overwrite to replace it") from None
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None


def _submit(script: str) -> str:
    """Hand the script to sbatch; returns the job's id."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("--submit: there is no sbatch here; use --output FILE, and submit it where SLURM is") from None
    if done.returncode:
        raise UserError(f"--submit: sbatch refuses the job: {done.stderr.strip()}; correct the options that it names")
    return done.stdout.strip()
