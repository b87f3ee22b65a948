"""Ranks as real processes over gloo: how a job ends when one of them fails, and who says why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_megatron import launch
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.failures import FailureBoard, guard_rank, is_consequence
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError

SetEnvironment = Callable[..., None]
WORKER = Path(__file__).with_name("launch_worker.py")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
}


def start_job(mode: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """The worker under this package's launcher."""
    command = [sys.executable, str(WORKER), mode, str(ranks)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def start_ranks(mode: str, ranks: int) -> tuple[list[int], str]:
    """The worker as ranks without any launcher, as under srun; exit codes and all output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = ENVIRONMENT | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        output = "".join(process.communicate(timeout=60)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


# -- jobs --


def test_the_rank_that_failed_is_named_first_and_ends_all() -> None:
    start = time.monotonic()
    job = start_job("raise", 4)
    assert time.monotonic() - start < 30  # the collective's own timeout is 120 s
    assert job.returncode == 1
    assert job.stderr.startswith("rank 3 of 4 failed first: RuntimeError: the last rank broke\nTraceback")
    assert job.stderr.count("Traceback") == 1


def test_consequences_that_come_first_wait_for_their_cause() -> None:
    job = start_job("raise_late", 3)
    assert job.returncode == 1
    assert job.stderr.startswith("rank 2 of 3 failed first: KeyError: 'the cause'\n")
    assert "rank 0 of 3" not in job.stderr and "rank 1 of 3" not in job.stderr


def test_a_hanging_rank_ends_by_the_collective_timeout_and_is_pointed_at() -> None:
    job = start_job("hang", 3)
    assert job.returncode == 1
    first, second, *_ = job.stderr.splitlines()
    assert "failed first: " in first and "Timed out" in first
    assert "no error came from rank 2: the cause is probably there" in second and "parallel.timeout_s" in second
    assert "rank 2 was at:" in job.stderr and "time.sleep(300)" in job.stderr


def test_a_user_error_in_a_rank_is_one_message_and_exit_code_2() -> None:
    job = start_job("user_error", 2)
    assert (job.returncode, job.stderr) == (2, "error: model.path=/m has 3 extra tensors; remove them\n")


def test_a_killed_rank_is_reported_by_the_launcher() -> None:
    job = start_job("kill", 2)
    assert (job.returncode, job.stderr) == (1, "rank 1 of 2 was ended by SIGKILL (out of memory?)\n")


def test_stopped_ranks_give_75() -> None:
    job = start_job("stopped", 2)
    assert (job.returncode, job.stderr) == (75, "")


def test_without_a_launcher_the_host_of_the_store_stays_until_all_are_done() -> None:
    exit_codes, output = start_ranks("done", 2)
    assert exit_codes == [0, 0], output
    assert sorted(output.splitlines()) == ["rank 0 done", "rank 1 done"]


def test_without_a_launcher_the_failing_host_of_the_store_ends_even_busy_ranks() -> None:
    exit_codes, output = start_ranks("raise_on_0", 2)
    assert exit_codes == [1, 1], output
    assert output.startswith("rank 0 of 2 failed first: RuntimeError: the first rank broke\n")
    assert output.count("Traceback") == 1


# -- the board --


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"), True),
        (RuntimeError("Timed out waiting 4000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: x"), True),
        (ConnectionResetError("reset"), True),
        (RuntimeError("shape mismatch"), False),
        (KeyError("gloo"), False),
        (UserError("connection closed by peer"), False),
        (CauseError("weight update 3 failed 3 times: no answer: timed out"), False),
        (ServerError(ServerAddress("http://n:1"), "start", "not ready after sglang.start_timeout_s=600 s"), False),
    ],
)
def test_which_errors_may_be_consequences(error: Exception, expected: bool) -> None:
    assert is_consequence(error) is expected


def test_a_consequence_by_its_cause() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise ConnectionError("gloo: connection closed by peer")
        except ConnectionError as error:
            raise RuntimeError("step 3 failed") from error
    assert is_consequence(caught.value)


def test_the_first_cause_wins_over_an_earlier_consequence() -> None:
    store = dist.HashStore()
    early, late = (FailureBoard(store, rank, 2, poll_s=0.05, grace_s=20) for rank in range(2))
    seen = []
    waiting = threading.Thread(target=lambda: seen.append(early.record(RuntimeError("Connection closed by peer"))))
    waiting.start()
    time.sleep(0.2)
    assert late.first() is None
    assert late.record(ValueError("cause")).rank == 1
    waiting.join(timeout=10)
    assert seen[0].rank == 1 and seen[0].message == "cause"
    assert late.record(ValueError("another")).message == "cause"


def test_a_consequence_without_a_cause_is_recorded_after_the_grace_period() -> None:
    board = FailureBoard(dist.HashStore(), 1, 2, poll_s=0.05, grace_s=0.2)
    start = time.monotonic()
    failure = board.record(RuntimeError("Connection closed by peer"))
    assert time.monotonic() - start >= 0.2
    assert (failure.rank, failure.consequence, failure.exit_code) == (1, True, 1)


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (UserError("x=1 is wrong; use 2"), 2, "error: x=1 is wrong; use 2\n"),
        (RuntimeError("broke\ndetails"), 1, "rank 0 of 1 failed first: RuntimeError: broke\nTraceback"),
        (SystemExit("odd"), 1, "rank 0 of 1 failed first: SystemExit: odd\n"),
    ],
)
def test_the_only_rank_of_a_job(
    capsys: pytest.CaptureFixture[str], error: BaseException, exit_code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as caught, launch.single_rank_environment():
        with guard_rank(FailureBoard.from_environment()):
            raise error
    assert caught.value.code == exit_code
    assert capsys.readouterr().err.startswith(message)


def test_stopping_passes_through() -> None:
    with pytest.raises(SystemExit) as caught, launch.single_rank_environment():
        with guard_rank(FailureBoard.from_environment()):
            raise SystemExit(75)
    assert caught.value.code == 75


# -- the environment --


@pytest.fixture
def rank_environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    def set_environment(**values: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_what_makes_a_rank(rank_environment: SetEnvironment) -> None:
    rank_environment()
    assert not launch.is_rank()
    rank_environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert launch.is_rank()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a' must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_half_an_environment_is_refused(
    rank_environment: SetEnvironment, values: dict[str, str], expected: str
) -> None:
    rank_environment(**values)
    with pytest.raises(UserError, match=expected):
        launch.is_rank()


@pytest.mark.parametrize(
    ("started", "layout", "expected"),
    [
        (
            8,
            ParallelLayout(tensor=2, data=2),
            ["8 ranks were started", "2×1×1×2 = 4; start 4 ranks, or set parallel.data=4"],
        ),
        (2, ParallelLayout(tensor=2, pipeline=2), ["2 ranks were started", "= 4; start 4 ranks"]),
        (1, ParallelLayout(data=2), ["1 rank was started", "start 2 ranks, or set parallel.data=1"]),
        (2, ParallelLayout(data=4, expert=4), ["= 4; start 4 ranks"]),
    ],
)
def test_more_or_fewer_ranks_than_the_layout_needs(
    rank_environment: SetEnvironment, started: int, layout: ParallelLayout, expected: list[str]
) -> None:
    rank_environment(RANK="0", WORLD_SIZE=str(started))
    with pytest.raises(UserError) as caught:
        launch.check_started_ranks(layout)
    for part in expected:
        assert part in str(caught.value)
    data = started // (layout.tensor * layout.context * layout.pipeline)
    usable = data > 0 and layout.tensor * layout.context * data % layout.expert == 0
    assert ("parallel.data=" in str(caught.value)) is usable


def test_one_gpu_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_local_devices(2)
    with pytest.raises(UserError, match="4 ranks on this machine need 4 GPUs, but 2 are visible"):
        launch.check_local_devices(4)


@pytest.mark.parametrize(
    ("exit_codes", "expected"),
    [
        ({0: 1, 1: 2}, 2),
        ({0: -15, 1: 2}, 2),
        ({0: 75, 1: -15}, 75),
        ({0: 75, 1: 1}, 1),
        ({0: -15, 1: -15}, 1),
        ({0: -9}, 1),
        ({0: 3}, 1),
    ],
)
def test_the_exit_code_of_a_job(exit_codes: dict[int, int], expected: int) -> None:
    assert launch._job_exit_code(exit_codes, 2) == expected


def test_an_exit_code_that_nobody_explains_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch._job_exit_code({0: -15, 1: 3}, 2) == 1
    assert capsys.readouterr().err == "rank 1 of 2 ended with exit code 3\n"
    for code in (1, 2, 75):  # the rank itself has said why
        launch._job_exit_code({1: code}, 2)
    assert capsys.readouterr().err == ""


def test_the_single_rank_environment_is_taken_back(rank_environment: SetEnvironment) -> None:
    rank_environment()
    with launch.single_rank_environment():
        assert launch.is_rank()
    assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
