"""Whole runs over real servers which are killed or hang in mid-generation and in mid-update.

A run goes on, or stops with one clear message within its timeouts. Where it goes on, no rollout is lost, made twice or
made by weights of two versions; and whatever it does, no rank stays blocked and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.manager import ServerManager
from tests.system.sglang_setup import ROOT, Serve, sglang_python

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("sglang_fault_worker.py")
RUN_LIMIT_S = 240.0  # a run that is still there then is ended, and its test fails
END_S = 20.0  # for what a run that was killed leaves behind to end
BATCHES, PROMPTS, SAMPLES = 4, 8, 4
UPDATE_TIMEOUT_S = 10.0
SETTINGS = {
    "model.init": "random",
    "task.reward_threshold": "null",  # partial credit: random weights must have rewards that differ
    "algorithm.mini_batches": "1",
    "optimizer.lr": "2e-3",  # each version's log-probabilities differ
    "optimizer.min_lr": "1e-3",
    "rollout.engine": "sglang",
    "rollout.prompts_per_batch": str(PROMPTS),
    "rollout.samples_per_prompt": str(SAMPLES),
    "rollout.max_response_tokens": "32",
    "train.rollout_batches": str(BATCHES),
    "eval.every": "0",
    "eval.prompts": "2",
    "parallel.timeout_s": "90",
    "sglang.bucket_mb": "1",  # of 2 MB: several buckets, of both ranks
    "sglang.update_timeout_s": str(UPDATE_TIMEOUT_S),
}
DATA_PARALLEL = {"parallel.tensor": "1", "parallel.expert": "2", "parallel.data": "2"}  # two heads, two senders


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    exit_code: int | None  # None: it had to be ended
    stdout: str
    stderr: str
    seconds: float
    after_s: float  # from the fault to the end

    @property
    def batches(self) -> list[dict[str, Any]]:
        """The metrics of the rollout batches."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["step"] > 0]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """What training got, group by group, from all heads."""
        lines = [line for path in self.folder.glob("groups_*.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]


class Run:
    """`train` as a user runs it, on a tiny random model, with a fault."""

    def __init__(self, folder: Path, fault: dict[str, Any] | None, **settings: str) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex  # in the environment of all processes that come of the run
        model = shutil.copytree(ROOT / "examples" / "quickstart" / "model", folder / "model")
        everything = SETTINGS | {"sglang.python": str(sglang_python()), "run.folder": str(folder / "run")} | settings
        overrides = [word for name, value in everything.items() for word in (f"--{name}", value)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "FAULT": "none" if fault is None else json.dumps(fault),
            "FAULT_FOLDER": str(folder),
            "FAULT_RUN": self.token,
        }
        self.shared = set(Path("/dev/shm").iterdir())  # before the run
        self.started_at = time.monotonic()
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), "train", "examples/quickstart/gspo.toml", "--model.path", str(model)]
                + overrides,
                cwd=ROOT,
                env=environment,
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def struck(self) -> bool:
        return (self.folder / "struck").exists() and (self.folder / "struck").stat().st_size > 0

    def family(self) -> list[psutil.Process]:
        """All processes that come of the run, wherever they have gone."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FAULT_RUN") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait(self) -> Outcome:
        """Wait for the end, and for everything that the run has started; what is left is a failure."""
        deadline = time.monotonic() + RUN_LIMIT_S
        while (exit_code := self.process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.5)
        seconds, ended_at = time.monotonic() - self.started_at, time.time()
        deadline = time.monotonic() + END_S
        while (left := self.family()) and time.monotonic() < deadline and exit_code is not None:
            time.sleep(0.2)
        names = [(p.pid, " ".join(p.cmdline())[:200]) for p in left if p.is_running()]
        self.end()
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        assert exit_code is not None, f"the run did not end:\n{stdout}\n{stderr}"
        assert not names, f"left behind: {names}"
        struck_at = float((self.folder / "struck").read_text()) if self.struck else ended_at
        return Outcome(self.folder, exit_code, stdout, stderr, seconds, ended_at - struck_at)

    def end(self) -> None:
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def shared_left(self) -> list[str]:
        """Files in shared memory that have come since the start and that no living process has mapped.

        Semaphores are left out: those of a killed process stay, by 32 bytes each. torch's daemon removes its files when
        the process that made them has ended, a moment later; other tests may run beside this one.
        """
        deadline = time.monotonic() + END_S
        while (left := self._unmapped()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def _unmapped(self) -> list[str]:
        mapped: set[Path] = set()
        for process in psutil.process_iter():
            try:
                mapped |= {Path(m.path) for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        left = set(Path("/dev/shm").iterdir()) - self.shared - mapped
        return sorted(path.name for path in left if not path.name.startswith("sem."))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Any]:
    """Starts runs, which end with the test."""
    started: list[Run] = []

    def start(fault: dict[str, Any] | None, servers: ServerManager | Serve | None = None, **settings: str) -> Run:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        if isinstance(servers, ServerManager):
            guards = {server.launch.port: server.pid for server in servers._servers}
        else:
            guards = {} if servers is None else servers.guards()
        for port, pid in guards.items():
            (folder / f"guard_{port}").write_text(str(pid))
        started.append(run := Run(folder, fault, **settings))
        return run

    yield start
    for run in started:
        run.end()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerManager]:
    """Two servers that the runs are given by address, and so can't start again."""
    config = SGLangConfig(python=str(sglang_python()), servers=2)
    model, logs = ROOT / "examples" / "quickstart" / "model", tmp_path_factory.mktemp("logs")
    with ServerManager(config, model, "float32", logs) as manager:
        manager.start()
        yield manager


def urls(servers: ServerManager, *numbers: int) -> str:
    return ",".join(servers._servers[number].address.url for number in numbers)


def check_struck(outcome: Outcome) -> None:
    assert (outcome.folder / "struck").exists(), f"no fault happened:\n{outcome.stdout}\n{outcome.stderr}"
    assert (outcome.folder / "in_flight").exists(), "nothing was on its way"


def check_went_on(outcome: Outcome) -> None:
    """The run did all it should, with every rollout there once, by the weights that its batch belongs to."""
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{outcome.stderr}"
    assert "Traceback" not in outcome.stderr, outcome.stderr
    rows = outcome.batches
    assert [row["step"] for row in rows] == list(range(1, BATCHES + 1))
    assert [row["policy_version"] for row in rows] == list(range(BATCHES))
    for row in rows:
        # By the weights of a version before or after they would be some 1e-4.
        assert row["kl_rollout_trainer"] < 1e-8, row
        assert row["sync_probe_max_abs"] is None or row["sync_probe_max_abs"] <= 1e-4, row
    assert rows[-1]["sync_probe_max_abs"] is not None
    assert sum(row["grad_norm"] > 0 for row in rows) >= BATCHES - 1, "versions must differ"
    groups = outcome.groups
    for batch in range(1, BATCHES + 1):
        of_batch = [group for group in groups if group["batch"] == batch]
        assert sorted(g["prompt"] for g in of_batch) == list(range((batch - 1) * PROMPTS, batch * PROMPTS))
        for group in of_batch:
            assert group["rollouts"] == SAMPLES and group["repeated"] == 0, group
            assert group["versions"] == [batch - 1], group
            assert set(group["finish_reasons"]) <= {"stop", "length"}, group


def check_stopped(outcome: Outcome, *words: str, limit_s: float) -> None:
    """The run ended in time, with one error that says what happened."""
    assert outcome.exit_code == 1, f"{outcome.stdout}\n{outcome.stderr}"
    assert outcome.after_s < limit_s
    assert outcome.stderr.count(" failed first: ") == outcome.stderr.count("Traceback") == 1, outcome.stderr
    [headline] = [line for line in outcome.stderr.splitlines() if " failed first: " in line]
    for word in words:
        assert word in headline, headline


def generates(url: str) -> bool:
    """Whether a server answers a request within two seconds."""
    body = json.dumps({"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (TimeoutError, urllib.error.URLError):
        return False


# -- servers of the run: started again --------------------------------------------------------------------------------


def test_the_only_server_is_killed_in_mid_generation(runs: Any) -> None:
    """It is started again, gets the same version, and what was missing is generated."""
    # Starting a server takes longer than the collective timeout: the other rank waits for it in another way.
    run = runs({"what": "kill", "phase": "generate", "version": 1}, **{"parallel.timeout_s": "12"})
    outcome = run.wait()
    check_struck(outcome)
    check_went_on(outcome)
    assert outcome.stdout.count("ready after") == 2
    assert "prompts wait for servers that were lost" in outcome.stderr
    assert "1 of 1 servers are lost and are started again" in outcome.stderr
    assert run.shared_left() == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["generate", "update"])
def test_one_of_two_servers_is_killed(runs: Any, phase: str) -> None:
    """The other takes over; the dead one is started again when the next weights come, or the same once more."""
    fault = {"what": "kill", "phase": phase, "version": 1}
    outcome = runs(fault, **DATA_PARALLEL, **{"sglang.servers": "2"}).wait()
    check_struck(outcome)
    check_went_on(outcome)
    assert outcome.stdout.count("ready after") == 3
    assert "prompts wait" not in outcome.stderr
    assert "1 of 2 servers are lost and are started again" in outcome.stderr
    assert outcome.stderr.count("is tried again") == (1 if phase == "update" else 0)


@pytest.mark.parametrize(
    "transport",
    ["distributed", pytest.param("tensor", marks=pytest.mark.slow), pytest.param("disk", marks=pytest.mark.slow)],
)
def test_a_server_is_killed_in_mid_update(runs: Any, transport: str) -> None:
    run = runs({"what": "kill", "phase": "update", "version": 2}, **{"sglang.transport": transport})
    outcome = run.wait()
    check_struck(outcome)
    check_went_on(outcome)
    assert outcome.stdout.count("ready after") == 2
    assert outcome.stderr.count("is tried again") == 1, outcome.stderr
    assert "1 of 1 servers are lost and are started again" in outcome.stderr
    assert run.shared_left() == []
    assert not list(outcome.folder.glob("run/weights*"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["generate", "update"])
def test_the_only_server_hangs(runs: Any, phase: str) -> None:
    """It is ended and started again."""
    outcome = runs({"what": "hang", "phase": phase, "version": 2}).wait()
    check_struck(outcome)
    check_went_on(outcome)
    assert "1 of 1 servers are lost and are started again" in outcome.stderr


@pytest.mark.slow
def test_a_server_that_cannot_start_again_ends_the_run(runs: Any) -> None:
    outcome = runs({"what": "doom", "phase": "generate", "version": 1}, **{"sglang.retries": "1"}).wait()
    check_struck(outcome)
    check_stopped(outcome, "could not bring back servers that were lost", "after 1 restarts in a row", limit_s=60.0)


# -- servers that others have started ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [pytest.param("generate", marks=pytest.mark.slow), "update"])
def test_one_of_two_servers_of_others_hangs(runs: Any, servers: ServerManager, phase: str) -> None:
    """The run goes on with the other one and says so."""
    run = runs(
        {"what": "hang", "phase": phase, "version": 2},
        servers,
        **DATA_PARALLEL,
        **{"sglang.addresses": urls(servers, 0, 1)},
    )
    try:
        outcome = run.wait()
    finally:
        for process in psutil.Process(servers._servers[0].pid).children(recursive=True):
            process.send_signal(signal.SIGCONT)
    check_struck(outcome)
    check_went_on(outcome)
    assert f"going on with 1 of 2 servers: SGLang server {urls(servers, 0)}" in outcome.stderr


def test_a_trainer_killed_in_mid_update_leaves_servers_that_refuse_to_serve(runs: Any, servers: ServerManager) -> None:
    """Until the next run has brought them its weights."""
    settings = {"sglang.addresses": urls(servers, 0, 1)}
    run = runs({"what": "trainer", "phase": "update", "version": 1}, servers, **settings)
    outcome = run.wait()
    assert run.struck
    assert outcome.exit_code == 1, outcome.stderr
    assert len([r for r in (0, 1) if f"rank {r} of 2 was ended by SIGKILL" in outcome.stderr]) > 0
    for number in (0, 1):
        assert not generates(urls(servers, number))
    outcome = runs(None, servers, **settings).wait()
    check_went_on(outcome)
    assert "is tried again" not in outcome.stderr
    for number in (0, 1):
        assert generates(urls(servers, number))


@pytest.mark.slow
def test_servers_of_others_die_one_after_the_other(runs: Any, servers: ServerManager) -> None:
    """With one of two the run goes on; without any it ends, and names it."""
    fault = {"what": "kill", "phase": "generate", "version": 1}
    outcome = runs(fault, servers, **{"sglang.addresses": urls(servers, 0, 1)}).wait()
    check_struck(outcome)
    check_went_on(outcome)
    assert f"going on with 1 of 2 servers: SGLang server {urls(servers, 0)}" in outcome.stderr
    settings = {"sglang.addresses": urls(servers, 1), "sglang.start_timeout_s": "5"}
    outcome = runs(fault, servers, **settings).wait()
    check_struck(outcome)
    check_stopped(outcome, "no server is left", urls(servers, 1), limit_s=30.0)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["distributed", "disk"])
def test_the_only_server_of_serve_is_killed(runs: Any, tmp_path: Path, transport: str) -> None:
    """`serve` starts it again, and the run, which has waited, brings it the weights and goes on."""
    (tmp_path / "serve").mkdir()
    serve = Serve(tmp_path / "serve", ROOT / "examples" / "quickstart" / "model")
    try:
        settings = {"sglang.addresses": serve.wait_ready(), "sglang.transport": transport}
        outcome = runs({"what": "kill", "phase": "generate", "version": 1}, serve, **settings).wait()
        assert serve.process.poll() is None, serve.read("stderr")
    finally:
        serve.process.terminate()
        serve.process.wait(END_S)
    check_struck(outcome)
    check_went_on(outcome)
    assert serve.read("stdout").count("ready after") == 2
    assert "no server answers; one is waited for" in outcome.stderr
    assert "is tried again" not in outcome.stderr


# -- the trainer is killed --------------------------------------------------------------------------------------------


def test_a_trainer_that_is_killed_leaves_no_server_behind(runs: Any) -> None:
    """Run.wait sees to it that nothing is left."""
    run = runs({"what": "trainer", "phase": "generate", "version": 1})
    outcome = run.wait()
    assert run.struck
    assert outcome.exit_code == 1
    assert outcome.stdout.count("ready after") == 1
