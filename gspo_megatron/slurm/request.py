"""What a user asks SLURM for, beside the config: read from the command line, checked by itself."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from gspo_megatron.config_io import wants_help
from gspo_megatron.errors import UserError

EARLY_S = 60  # SLURM may send the signal so much earlier than asked
_MOST_LEAD_S = 65535  # of sbatch --signal
_WORD = re.compile(r"[\w.,:=@%+/\[\]\-]+")
# --name, --name=any value, -x, or -x value without what sbatch reads as the value's end.
_OPTION = re.compile(r"(?P<name>--[a-z][a-z0-9-]+)(=.*)?|(?P<letter>-[a-zA-Z])( (?!-)[^\s#\"'\\]+)?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
# What the script depends on; everything else may be added by --sbatch.
_OWN_OPTIONS = {
    "--nodes": "--nodes",
    "-N": "--nodes",
    "--ntasks": "--nodes",
    "-n": "--nodes",
    "--ntasks-per-node": "--nodes",
    "--tasks": "--nodes",
    "--tasks-per-node": "--nodes",
    "--gpus-per-node": "--gpus-per-node",
    "--gpus": "--gpus-per-node",
    "-G": "--gpus-per-node",
    "--cpus-per-task": "--cpus-per-rank",
    "-c": "--cpus-per-rank",
    "--time": "--time",
    "-t": "--time",
    "--partition": "--partition",
    "-p": "--partition",
    "--account": "--account",
    "-A": "--account",
    "--job-name": "--job-name",
    "-J": "--job-name",
    "--array": "--array",
    "-a": "--array",
    "--signal": "--signal-lead-s",
    "--no-requeue": "--max-requeues 0",
}
_FIXED_OPTIONS = ("--requeue", "--open-mode", "--output", "-o", "--error", "-e", "--wrap", "--export")


@dataclass(frozen=True)
class JobRequest:
    """The resources and habits of one job."""

    nodes: int  # that train
    gpus_per_node: int = 8  # 0: ranks run on CPUs
    cpus_per_rank: int = 0  # 0: SLURM's default
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    job_name: str = ""  # "": the run folder's name
    sbatch: tuple[str, ...] = ()  # further options of sbatch
    signal_lead_s: int = 300  # from the signal to the time limit
    max_requeues: int = 100
    server_nodes: int = 0  # 0: servers, where there are any, run on the nodes that train
    server_gpus_per_node: int | None = None  # None: as on nodes that train
    server_partition: str = ""  # "": as for nodes that train
    container_image: str = ""
    container_mounts: str = ""
    prologue: str = ""  # file that the job sources first
    python: str = ""  # "": this one, or python3 in a container
    array_limit: int = 0  # array jobs that run at one time; 0: all

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_rank", 0), ("max_requeues", 0)):
            self._at_least(name, least)
        for name in ("server_nodes", "array_limit", "server_gpus_per_node"):
            self._at_least(name, 0)
        for name in ("partition", "server_partition", "account", "job_name"):
            value = getattr(self, name)
            if value and not _WORD.fullmatch(value):
                raise UserError(f"{_flag(name)} {value!r} is no name: use letters, digits and ._-")
        for option in self.sbatch:
            _check_option(option)
        seconds = self.time_limit_s
        if not 0 < self.signal_lead_s <= _MOST_LEAD_S:
            raise UserError(f"--signal-lead-s {self.signal_lead_s} must lie between 1 and {_MOST_LEAD_S} seconds")
        if self.signal_lead_s + EARLY_S > seconds:
            raise UserError(
                f"--signal-lead-s {self.signal_lead_s} is too long for --time {self.time}: SLURM may send it up to "
                f"{EARLY_S} s earlier, which would be before the job starts; ask for more time"
                + (f", or for a lead of at most {seconds - EARLY_S} s" if seconds > EARLY_S else "")
            )
        if self.server_nodes == 0 and (self.server_partition or self.server_gpus_per_node is not None):
            given = "server_partition" if self.server_partition else "server_gpus_per_node"
            raise UserError(f"{_flag(given)} is not read without --server-nodes; give both, or neither")
        if self.container_mounts and not self.container_image:
            raise UserError(f"--container-mounts {self.container_mounts} is not read without --container-image")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not value.isprintable():
                raise UserError(f"{_flag(field.name)} {value!r} holds a character that can't be printed; leave it out")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"{_flag(name)} {value} must be at least {least}")

    @property
    def time_limit_s(self) -> int:
        """`time` in seconds; SLURM itself counts in minutes, rounded up."""
        match = _TIME.fullmatch(self.time)
        if match is None:
            raise UserError(
                f"--time {self.time!r} is no time: write minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
                "days-hours:minutes or days-hours:minutes:seconds, e.g. 24:00:00"
            )
        parts = [int(part) for part in match["clock"].split(":")]
        if match["days"] is not None:  # hours come first
            hours, minutes, seconds = (parts + [0, 0])[:3]
            hours += 24 * int(match["days"])
        elif len(parts) == 3:
            hours, minutes, seconds = parts
        else:  # minutes come first
            hours, minutes, seconds = 0, *(parts + [0])[:2]
        return 3600 * hours + 60 * minutes + seconds


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_option(option: str) -> None:
    match = _OPTION.fullmatch(option)
    if match is None or not option.isprintable():
        raise UserError(
            f"--sbatch={option!r} is not one option of sbatch; write each by itself and its value behind =, as in "
            "--sbatch=--exclusive --sbatch=--mem=0"
        )
    name = match["name"] or match["letter"]
    if own := _named(name, list(_OWN_OPTIONS)):
        raise UserError(f"--sbatch={option} would contradict the rest of the job; use {_OWN_OPTIONS[own]} instead")
    if fixed := _named(name, _FIXED_OPTIONS):
        raise UserError(f"--sbatch={option} would contradict the script, which needs its own {fixed}; leave it out")


def _named(name: str, options: Sequence[str]) -> str | None:
    """The option that sbatch takes `name` for: it reads --no-req as --no-requeue."""
    return next((o for o in options if o == name or (name.startswith("--") and o.startswith(name))), None)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """The command line of `slurm`."""

    config: Path
    overrides: tuple[str, ...]  # --section.key value …, as they go to every rank
    request: JobRequest
    array: Path | None
    output: Path | None
    overwrite: bool
    submit: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.prog}; --help lists the options")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options beside CONFIG and its overrides."""
    parser = _Parser(prog=prog, usage="%(prog)s", description=description, allow_abbrev=False)
    job, defaults = parser.add_argument_group("job"), JobRequest(nodes=1)

    def add(name: str, kind: type, metavar: str, text: str) -> None:
        default = getattr(defaults, name)
        shown = "" if default in ("", None, (), 0) or name == "nodes" else f" (default: {default})"
        job.add_argument(_flag(name), type=kind, metavar=metavar, default=default, help=(text + shown))

    job.add_argument("--nodes", type=int, metavar="N", required=True, help="nodes that train")
    add("gpus_per_node", int, "N", "GPUs of each, one a rank; 0: ranks on CPUs")
    add("cpus_per_rank", int, "N", "cores of each rank; left out: SLURM's default")
    add("time", str, "LIMIT", "time limit of each start, as for sbatch")
    add("partition", str, "NAME", "partition; left out: the cluster's default")
    add("account", str, "NAME", "account")
    add("job_name", str, "NAME", "name of the job; left out: the run folder's")
    add("signal_lead_s", int, "S", "seconds before the time limit at which the run is told to save")
    add("max_requeues", int, "N", "how often the job may come back")
    add("server_nodes", int, "N", "further nodes for SGLang servers, as a second component of the job")
    add("server_gpus_per_node", int, "N", "GPUs of each; left out: --gpus-per-node")
    add("server_partition", str, "NAME", "their partition; left out: --partition")
    add("container_image", str, "IMAGE", "run all programs in this image (pyxis)")
    add("container_mounts", str, "MOUNTS", "further mounts beside the working folder, as for pyxis")
    add("prologue", str, "FILE", "file that the job sources first: modules, variables")
    add("python", str, "PROGRAM", "Python on the nodes; left out: this one, or python3 in a container")
    job.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="a further option of sbatch; may be repeated"
    )
    job.add_argument("--array", type=Path, metavar="FILE", help="one job a line: [CONFIG.toml] [--section.key value …]")
    add("array_limit", int, "N", "how many of them run at one time; left out: all")
    what = parser.add_argument_group("what to do with it")
    what.add_argument("--dry-run", action="store_true", help="print the plan and the script (the default)")
    what.add_argument("--output", type=Path, metavar="FILE", help="write the script")
    what.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    what.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    return parser


def parse(arguments: Sequence[str], prog: str, description: str) -> Arguments:
    """Raises UserError for what is missing, unknown or contradicts itself."""
    if wants_help(arguments):
        make_parser(prog, description).parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"slurm needs a config file first: {prog}")
    own, overrides = split_overrides(arguments[1:])
    options = make_parser(prog, description).parse_args(own)
    if options.dry_run and (options.output or options.submit):
        raise UserError("--dry-run does nothing but print; leave it out, or --output and --submit")
    if options.overwrite and not options.output:
        raise UserError("--overwrite is not read without --output FILE; give both, or neither")
    if options.array_limit and not options.array:
        raise UserError(f"--array-limit {options.array_limit} is not read without --array FILE; give both, or neither")
    values = {f.name: getattr(options, f.name) for f in fields(JobRequest)} | {"sbatch": tuple(options.sbatch)}
    if not values["python"]:
        values["python"] = "python3" if options.container_image else sys.executable
    return Arguments(
        config=Path(arguments[0]),
        overrides=tuple(overrides),
        request=JobRequest(**values),
        array=options.array,
        output=options.output,
        overwrite=options.overwrite,
        submit=options.submit,
    )


def split_overrides(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of `slurm`, and overrides of the config, which have a dot in their name."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        is_override = token.startswith("--") and "." in token.partition("=")[0]
        (overrides if is_override else own).append(token)
        if is_override and "=" not in token and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def read_array(path: Path) -> list[list[str]]:
    """The words of each line of an array file; empty lines and those that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--array {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(shlex.split(line))
        except ValueError as error:
            raise UserError(f"--array {path}, line {number} cannot be split: {error}; close the quotation") from None
    if not found:
        raise UserError(f"--array {path} holds no line; write one job a line: [CONFIG.toml] [--section.key value …]")
    return found
