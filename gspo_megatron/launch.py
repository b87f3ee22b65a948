"""Start the ranks of a job on this machine, or take part as one that torchrun or SLURM has started.

`python -m gspo_megatron train …` starts as many local processes as the layout needs. Under torchrun, or wherever
RANK and WORLD_SIZE are set, the same command is one of the ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial

import psutil
import torch

from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, print_error
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.stop import StopSignals, blocked

_PREPARED = "GSPO_MEGATRON_PREPARED"  # set for ranks whose launcher has checked the config and made the run folder


def is_rank() -> bool:
    """Whether this process was started as one rank of a job. Raises UserError for half an environment."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise UserError(f"the environment variable {name}={os.environ[name]!r} must be an integer")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"RANK and WORLD_SIZE are set, but {name} is not; start the ranks with torchrun or set it")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UserError(f"RANK={os.environ['RANK']} must be below WORLD_SIZE={os.environ['WORLD_SIZE']}")
    return True


def is_prepared() -> bool:
    """Whether this rank's launcher has already checked the config and made the run folder."""
    return os.environ.get(_PREPARED) == "1"


def check_started_ranks(layout: ParallelLayout) -> None:
    """Raise UserError unless as many ranks were started as the layout needs, each with its own GPU."""
    started = int(os.environ["WORLD_SIZE"])
    if started != layout.world_size:
        replica = layout.tensor * layout.context * layout.pipeline
        data, left_over = divmod(started, replica)
        fits_experts = layout.tensor * layout.context * data % (layout.expert * layout.expert_tensor) == 0
        remedy = f"start {layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
        if left_over == 0 and fits_experts:
            remedy += f", or set parallel.data={data}"
        raise UserError(
            f"{started} rank{'s were' if started > 1 else ' was'} started but parallel needs "
            f"tensor×context×pipeline×data = {layout.tensor}×{layout.context}×{layout.pipeline}×{layout.data} = "
            f"{layout.world_size}; {remedy}"
        )
    check_local_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_local_devices(ranks: int) -> None:
    """Raise UserError if this machine has GPUs, but fewer than the ranks it would run."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        devices = torch.cuda.device_count()
        raise UserError(
            f"{ranks} ranks on this machine need {ranks} GPUs, but {devices} {'is' if devices == 1 else 'are'} "
            "visible; make the [parallel] degrees smaller, start the ranks on several machines with torchrun, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


@contextlib.contextmanager
def single_rank_environment() -> Iterator[None]:
    """The environment of the only rank of a job, for as long as the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def launch_local(ranks: int, command: Sequence[str], signals: StopSignals | None = None) -> int:
    """Run `command` as so many ranks on this machine and wait for them.

    Args:
        ranks: number of processes, one a GPU where there are GPUs.
        command: program and arguments. Each process has RANK, WORLD_SIZE and the rest of torchrun's environment,
            and ends through `guard_rank`, which prints the error of the job; nothing is printed twice here.
        signals: what this process is sent while it waits is passed on to the ranks, which take it with
            `StopSignals.listening`. None: SIGTERM ends the job.

    Returns:
        The job's exit code: 0, 2 if a rank ended with a UserError, 75 if the ranks stopped on a signal, else 1.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_torchelastic()
    os.environ[_PREPARED] = "1"
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the machine's cores
    with tempfile.TemporaryDirectory(prefix="gspo_megatron_") as log_dir:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            role="rank",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            # On those it handles torch's launcher ends the ranks, and kills them after 30 seconds.
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT" if signals is not None else "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        )
        try:
            with _passing_on(signals, command):
                elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return _job_exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, ranks)
        except SignalException as error:
            print_error(f"stopped by {signal.Signals(error.sigval).name}\n")
            return EXIT_FAILED
        finally:
            del os.environ[_PREPARED]
    return EXIT_DONE


@contextlib.contextmanager
def _passing_on(signals: StopSignals | None, command: Sequence[str]) -> Iterator[None]:
    """Ranks that are started inside get the signals that this process gets."""
    if signals is None:
        yield
        return
    signals.on_signal = partial(_pass_on, command)
    if signals.received is not None:  # before there were ranks
        threading.Thread(target=_pass_on, args=(command, signals.received), daemon=True).start()
    try:
        with blocked():
            yield
    finally:
        signals.on_signal = None


def _pass_on(command: Sequence[str], number: signal.Signals) -> None:
    """Send a signal to the ranks; waits for them to be there."""
    for _ in range(600):
        ranks = [child for child in psutil.Process().children() if _is_running(child, command)]
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if ranks:
            return
        time.sleep(0.1)


def _is_running(process: psutil.Process, command: Sequence[str]) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline() == list(command)
    return False


def _silence_torchelastic() -> None:
    """torchrun reports every failed process in its own words; the rank that failed first has said it already."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _job_exit_code(exit_codes: dict[int, int], ranks: int) -> int:
    """One exit code for the job. Says which ranks were killed or ended by a library, which nobody else says.

    The launcher ends the remaining ranks with SIGTERM, so that code is no news where there is another.
    """
    causes = {rank: code for rank, code in exit_codes.items() if code != -signal.SIGTERM} or exit_codes
    for rank, code in sorted(causes.items()):
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            print_error(f"rank {rank} of {ranks} was ended by {signal.Signals(-code).name}{hint}\n")
        elif code not in (EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED):
            print_error(f"rank {rank} of {ranks} ended with exit code {code}\n")
    if EXIT_USER_ERROR in causes.values():
        return EXIT_USER_ERROR
    if set(causes.values()) == {EXIT_STOPPED}:
        return EXIT_STOPPED
    return EXIT_FAILED
