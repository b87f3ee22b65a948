"""The command line: `python -m gspo_megatron COMMAND …`.

Each command is one function of its arguments that returns the exit code; a new one is a line in COMMANDS. Heavy
imports are made inside commands, so that help and a mistyped name answer at once.

Exit codes: 0 done; 2 the user's input is wrong (one message, no traceback); 75 stopped on a signal, to be resumed;
1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from gspo_megatron.config import MeasureConfig, SftConfig, TrainConfig
from gspo_megatron.errors import UserError, nearest
from gspo_megatron.stop import StopSignals

if TYPE_CHECKING:
    from gspo_megatron.preflight import Preflight

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2
PROGRAM = "python -m gspo_megatron"

Arguments = Sequence[str]


@dataclass(frozen=True)
class Command:
    """A line of --help and the function behind it."""

    usage: str
    summary: str
    run: Callable[[Arguments], int]


# ---------------------------------------------------------------------------------------------------------------------
# Commands that run as ranks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RankedCommand:
    """A command that every rank of a layout runs."""

    name: str
    config: type[TrainConfig] | type[SftConfig] | type[MeasureConfig]
    worker: str  # module of gspo_megatron whose run(config) is the work of one rank
    writes_run_folder: bool
    saves_on_signal: bool = False

    def __call__(self, arguments: Arguments) -> int:
        if not self.saves_on_signal:
            return self._run(arguments, None)
        with StopSignals().listening() as signals:  # before anything is imported that takes its time
            return self._run(arguments, signals)

    def _run(self, arguments: Arguments, signals: StopSignals | None) -> int:
        from gspo_megatron import config_io, launch

        if config_io.wants_help(arguments):
            command = COMMANDS[self.name]
            config_io.print_help(self.config, f"{PROGRAM} {command.usage}", command.summary)
            return EXIT_DONE
        if launch.is_rank():
            return self._as_rank(arguments, signals)
        config = self._load(arguments)
        world_size = config.parallel.layout().world_size
        launch.check_local_devices(world_size)
        if self._is_finished(config):
            return EXIT_DONE
        lock = self._prepare(config)
        if world_size == 1:
            with launch.single_rank_environment():
                return self._as_rank(arguments, signals, prepared=True)
        rank = [sys.executable, "-m", "gspo_megatron", self.name, *arguments]
        exit_code = launch.launch_local(world_size, rank, signals)
        if exit_code in (EXIT_USER_ERROR, EXIT_FAILED):
            self._release(config)
        del lock  # held until here
        return exit_code

    def _as_rank(self, arguments: Arguments, signals: StopSignals | None, *, prepared: bool = False) -> int:
        from gspo_megatron import launch
        from gspo_megatron.failures import FailureBoard, end_process, guard_rank

        with guard_rank(FailureBoard.from_environment()) as board:
            config = self._load(arguments)
            launch.check_started_ranks(config.parallel.layout())
            has_launcher = prepared or launch.is_prepared()
            if not has_launcher and self._is_finished(config, is_said=board.rank == 0):
                return EXIT_DONE
            prepares = board.rank == 0 and not has_launcher
            lock = self._prepare(config) if prepares else None
            try:
                exit_code = self._work(config, signals)
            except Exception:
                if prepares or prepared:
                    self._release(config)
                raise
            del lock  # held until here
        if board.world_size > 1:
            # Megatron's DDP keeps process groups alive, and their threads may abort an interpreter that winds down.
            end_process(exit_code)
        return exit_code

    def _load(self, arguments: Arguments) -> TrainConfig | SftConfig:
        path, overrides = _config_and_overrides(self.name, arguments)
        return _load(self.config, path, overrides)

    def _prepare(self, config: TrainConfig | SftConfig) -> IO[str] | None:
        """Refuse what can't work, say what will be done, make the run folder; returns its lock."""
        from gspo_megatron import preflight, run_folder

        checked = _check(config) if self.writes_run_folder else preflight.check_eval(_train(config))
        inputs = preflight.check_inputs(config)
        print(checked.describe(), inputs.describe(), sep="\n", flush=True)
        return run_folder.prepare(config) if self.writes_run_folder else None

    def _is_finished(self, config: TrainConfig | SftConfig, *, is_said: bool = True) -> bool:
        """Whether run.resume finds nothing to do. Every rank looks by itself."""
        from gspo_megatron import run_folder

        finished = self.writes_run_folder and run_folder.is_finished(config)
        if finished and is_said:
            print(f"the run in run.folder={config.run.folder} has finished; nothing is left to do")
        return finished

    def _release(self, config: TrainConfig | SftConfig) -> None:
        """After a failure: a run without a single record doesn't occupy its folder."""
        from gspo_megatron import run_folder

        if self.writes_run_folder:
            run_folder.release(config)

    def _work(self, config: TrainConfig | SftConfig, signals: StopSignals | None) -> int:
        import importlib

        from gspo_megatron.logs import quiet_libraries

        quiet_libraries()
        worker = importlib.import_module(f"gspo_megatron.{self.worker}")
        if signals is None:
            worker.run(config)
            return EXIT_DONE
        return worker.run(config, signals)


def _config_and_overrides(command: str, arguments: Arguments) -> tuple[Path, Arguments]:
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{command} needs a config file first: {PROGRAM} {COMMANDS[command].usage}")
    return Path(arguments[0]), arguments[1:]


def _load(
    cls: type[TrainConfig] | type[SftConfig] | type[MeasureConfig], path: Path, overrides: Arguments
) -> TrainConfig | SftConfig:
    from gspo_megatron.config_io import load_config

    if issubclass(cls, MeasureConfig):
        return load_config(MeasureConfig, path, overrides)
    return load_config(TrainConfig, path, overrides) if cls is TrainConfig else load_config(SftConfig, path, overrides)


def _train(config: TrainConfig | SftConfig) -> TrainConfig:
    assert isinstance(config, TrainConfig)
    return config


def _check(config: TrainConfig | SftConfig, *, here: bool = True) -> Preflight:
    from gspo_megatron import preflight

    if isinstance(config, TrainConfig):
        return preflight.check_train(config, here=here)
    return preflight.check_sft(config, here=here)


# ---------------------------------------------------------------------------------------------------------------------
# Commands of one process
# ---------------------------------------------------------------------------------------------------------------------


_ELSEWHERE = "--elsewhere"
_ELSEWHERE_HELP = f"{_ELSEWHERE}: the run is for another machine; ask for no GPU, SGLang, server or weights here."


def _run_check(arguments: Arguments) -> int:
    from gspo_megatron import config_io, preflight

    if config_io.wants_help(arguments):
        print(f"usage: {PROGRAM} {COMMANDS['check'].usage}\n\n{COMMANDS['check'].summary}.\n\n{_ELSEWHERE_HELP}")
        return EXIT_DONE
    here = _ELSEWHERE not in arguments
    path, overrides = _config_and_overrides("check", [word for word in arguments if word != _ELSEWHERE])
    tables = config_io.read_toml(path)
    is_sft = "sft" in tables or any(token.startswith("--sft.") for token in overrides)
    config = _load(SftConfig if is_sft else TrainConfig, path, overrides)
    checked = _check(config, here=here)
    inputs = preflight.check_inputs(config)
    print(f"{'sft' if is_sft else 'train'} {path}", checked.describe(), inputs.describe(), sep="\n")
    return EXIT_DONE


def _run_serve(arguments: Arguments) -> int:
    from gspo_megatron import config_io

    if config_io.wants_help(arguments):
        config_io.print_help(TrainConfig, f"{PROGRAM} {COMMANDS['serve'].usage}", COMMANDS["serve"].summary)
        return EXIT_DONE
    path, overrides = _config_and_overrides("serve", arguments)
    config = _train(_load(TrainConfig, path, overrides))
    from gspo_megatron.rollout.sglang import serve
    from gspo_megatron.rollout.sglang.address import ServerError

    try:
        serve.run(config)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _run_slurm(arguments: Arguments) -> int:
    from gspo_megatron.slurm import command

    command.run(arguments, usage=f"{PROGRAM} {COMMANDS['slurm'].usage}", summary=COMMANDS["slurm"].summary)
    return EXIT_DONE


def _run_report(arguments: Arguments) -> int:
    parser = _parser("report")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="run folder with metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into")
    options = parser.parse_args(arguments)
    from gspo_megatron.stability.report import summarize, write_report

    paths = write_report(options.folders, options.out)
    print(*map(summarize, options.folders), *paths, sep="\n")
    return EXIT_DONE


def _run_metrics(arguments: Arguments) -> int:
    _parser("metrics").parse_args(arguments)
    from gspo_megatron.metrics import METRICS

    width = max(map(len, METRICS))
    for name, description in METRICS.items():
        print(f"{name:<{width}}  {description}")
    return EXIT_DONE


def _run_settings(arguments: Arguments) -> int:
    _parser("settings").parse_args(arguments)
    from gspo_megatron.config_io import render_reference

    print(render_reference(), end="")
    return EXIT_DONE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.prog}")


def _parser(name: str) -> _Parser:
    command = COMMANDS[name]
    return _Parser(prog=f"{PROGRAM} {command.usage}", usage="%(prog)s", description=f"{command.summary}.")


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------

_CONFIG_USAGE = "CONFIG.toml [--section.key value …]"

COMMANDS: dict[str, Command] = {
    "train": Command(
        f"train {_CONFIG_USAGE}",
        "Train a policy by reinforcement learning",
        _RankedCommand("train", TrainConfig, "trainer", writes_run_folder=True, saves_on_signal=True),
    ),
    "sft": Command(
        f"sft {_CONFIG_USAGE}",
        "Cold-start a policy on the task's worked answers",
        _RankedCommand("sft", SftConfig, "sft", writes_run_folder=True),
    ),
    "eval": Command(
        f"eval {_CONFIG_USAGE}",
        "Evaluate model.path of a train config on the held-out split",
        _RankedCommand("eval", TrainConfig, "evaluate", writes_run_folder=False),
    ),
    "measure": Command(
        f"measure {_CONFIG_USAGE}",
        "Measure how a policy's ratios take length, flipped routes and lost precision",
        _RankedCommand("measure", MeasureConfig, "measure", writes_run_folder=False),
    ),
    "serve": Command(
        f"serve {_CONFIG_USAGE}",
        "Start the SGLang servers of a train config on this machine and keep them running",
        _run_serve,
    ),
    "check": Command(
        f"check {_CONFIG_USAGE} [{_ELSEWHERE}]",
        "Say what a train or sft config would do and what is wrong with it, without running it",
        _run_check,
    ),
    "slurm": Command(
        f"slurm {_CONFIG_USAGE} --nodes N [OPTION …] [--dry-run | --output FILE | --submit]",
        "Make a SLURM job of a train config that saves before its time limit and comes back",
        _run_slurm,
    ),
    "report": Command(
        "report RUN_FOLDER [RUN_FOLDER …] [--out DIR]",
        "Write report.html and report.png of one or more runs",
        _run_report,
    ),
    "metrics": Command("metrics", "List the metrics of metrics.jsonl", _run_metrics),
    "settings": Command("settings", "List every config key with type, default and meaning", _run_settings),
}


def _help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROGRAM} COMMAND …", ""]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{PROGRAM} COMMAND --help lists the options of a command."]
    return "\n".join(lines)


def _dispatch(arguments: Arguments) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help_text())
        return EXIT_DONE
    if not arguments:
        print(_help_text(), file=sys.stderr)
        return EXIT_USER_ERROR
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f'unknown command "{name}".{nearest(name, COMMANDS)} Commands: {", ".join(COMMANDS)}')
    return COMMANDS[name].run(arguments[1:])


def main(arguments: Arguments | None = None) -> int:
    """Run one command; returns the exit code. Anything but a UserError leaves with its traceback."""
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of the output, such as `head`, has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
