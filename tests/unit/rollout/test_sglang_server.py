"""One server as a process, and several under a manager: a small stand-in answers instead of SGLang."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
from gspo_megatron.rollout.sglang.manager import ServerManager, reachable_host
from gspo_megatron.rollout.sglang.server import Launch, SGLangServer, check_port, free_ports, server_url

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("sglang_server_stand_in.py")
LIMIT_S = 30.0
KEY = "0123456789abcdef-the-key"

pytestmark = pytest.mark.timeout(120)


class Program:
    """The stand-in as a program in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.path = folder / "python"
        self.path.write_text(f"#!{sys.executable}\n" + STAND_IN.read_text())
        self.path.chmod(0o755)
        self.behave()

    def behave(self, *words: str) -> None:
        (self.folder / "behaviour").write_text("\n".join(words))

    def pids(self) -> list[int]:
        """Of all servers so far, and of their children."""
        path = self.folder / "pids"
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    def launch(self, key: str | None = None, port: int | None = None) -> Launch:
        port = port or free_ports("127.0.0.1", 1)[0]
        command = [str(self.path), "-m", "sglang.launch_server", "--model-path", "/m", "--host", "127.0.0.1"]
        return Launch(
            ServerAddress(server_url("127.0.0.1", port), key),
            [*command, "--port", str(port)],
            dict(os.environ),
            "/m",
            "127.0.0.1",
            port,
            self.folder / "server.log",
        )


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "program")


@pytest.fixture
def make(program: Program) -> Iterator[Callable[..., SGLangServer]]:
    servers: list[SGLangServer] = []

    def make(key: str | None = None, grace_s: float = 10.0) -> SGLangServer:
        servers.append(SGLangServer(program.launch(key), grace_s=grace_s))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S:.0f} s"
        time.sleep(0.05)


def living(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def assert_nothing_left(program: Program, *others: int) -> None:
    pids = [*program.pids(), *others]
    assert len(pids) >= 2
    wait_for(lambda: not living(pids), f"the end of {pids}")


# -- one server --


def test_a_server_starts_answers_and_stops(make: Callable[..., SGLangServer], program: Program) -> None:
    server = make()
    assert not server.is_running
    server.start()
    assert 0 < server.wait_ready(LIMIT_S) < LIMIT_S
    assert server.is_running and len(living(program.pids())) == 2
    server.stop()
    assert not server.is_running and not server.ended_by_itself and not living(program.pids())
    assert server.how_it_ended() == "was ended by SIGTERM"
    server.stop()  # again does nothing


def test_a_server_that_ignores_sigterm_is_killed(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("stubborn")
    server = make(grace_s=0.5)
    server.start()
    server.wait_ready(LIMIT_S)
    server.stop()
    assert not living(program.pids()) and server.how_it_ended() == "was ended by SIGKILL"
    assert "[guard] the server was killed: it did not end within 0.5 s of SIGTERM" in server.log_end()


def test_signals_that_a_scheduler_sends_to_all_leave_the_server_alone(
    make: Callable[..., SGLangServer], program: Program
) -> None:
    server = make()
    server.start()
    server.wait_ready(LIMIT_S)
    for number, pid in (("USR1", server.pid), ("TERM", server.pid), ("USR1", program.pids()[0])):
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)
    time.sleep(1.0)  # five looks of the guard
    assert server.is_running and len(living(program.pids())) == 2
    server.stop()
    assert not living(program.pids()) and server.how_it_ended() == "was ended by SIGTERM"


def test_an_early_death_is_told_with_the_telling_lines(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("die")
    server = make()
    server.start()
    with pytest.raises(ServerError) as error:
        server.wait_ready(LIMIT_S)
    assert "it ended with exit code 1" in str(error.value) and "ValueError: no such model" in str(error.value)
    assert "some words" not in str(error.value) and str(program.folder / "server.log") in str(error.value)
    assert server.ended_by_itself
    assert_nothing_left(program)


def test_a_server_that_is_never_ready_is_killed(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("deaf")
    server = make()
    server.start()
    wait_for(lambda: len(program.pids()) == 2, "its start")
    with pytest.raises(ServerError, match=r"not ready after sglang\.start_timeout_s=1 seconds"):
        server.wait_ready(1)
    assert not server.is_running and not living(program.pids())


def test_another_server_at_the_address(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("stranger")
    server = make()
    server.start()
    with pytest.raises(ServerError, match="another server answers, which serves 'another' and not '/m'"):
        server.wait_ready(LIMIT_S)


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    launch = dataclasses.replace(Program(tmp_path / "y").launch(), command=[str(tmp_path / "none")])
    server = SGLangServer(launch)
    server.start()
    with pytest.raises(ServerError, match=r"ended with exit code 127.*\n.*none cannot be started: No such file"):
        server.wait_ready(LIMIT_S)


def test_a_killed_guard_takes_the_server_along(make: Callable[..., SGLangServer], program: Program) -> None:
    server = make()
    server.start()
    server.wait_ready(LIMIT_S)
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: not living(program.pids()[:1]), "the server's end")  # by the kernel, before anybody looks
    assert server.ended_by_itself and server.how_it_ended() == "was ended by SIGKILL"
    os.kill(program.pids()[1], signal.SIGKILL)  # a child in a session of its own is beyond reach


def test_a_killed_server_ends_its_guard_and_children(make: Callable[..., SGLangServer], program: Program) -> None:
    server = make()
    server.start()
    server.wait_ready(LIMIT_S)
    os.kill(program.pids()[0], signal.SIGKILL)
    wait_for(lambda: server.ended_by_itself, "the end")
    assert server.how_it_ended() == "was ended by SIGKILL" and not living(program.pids())
    assert "[guard] the server was ended by SIGKILL" in server.log_end()


PARENT = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_sglang_server import Program, SGLangServer
program = Program(Path(sys.argv[2]))
server = SGLangServer(program.launch())
thread = threading.Thread(target=server.start)  # a server doesn't end with the thread that has started it
thread.start()
thread.join()
server.wait_ready(30)
time.sleep(1.5)
assert server.is_running
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(__file__).parent), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    guard = int(parent.stdout.readline())
    pids = [int(word) for word in (folder / "pids").read_text().split()]
    assert len(living([guard, *pids])) == 3
    parent.send_signal(number)
    parent.wait(LIMIT_S)
    wait_for(lambda: not living([guard, *pids]), f"the end of {pids}")
    assert "is gone" in (folder / "server.log").read_text()


# -- the key --


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs on this machine make such files too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def secret_files() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("gspo_sglang_*/*"))


def test_the_key_is_nowhere_to_be_read(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("tell_key")
    before = secret_files()
    server = make(KEY)
    server.start()
    (file,) = secret_files() - before
    assert KEY in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    server.wait_ready(LIMIT_S)  # asks /model_info with the key
    assert not file.parent.exists()
    for pid in [server.pid, *program.pids()]:
        process = psutil.Process(pid)
        assert KEY not in " ".join(process.cmdline()) and KEY not in process.environ().values()
    server.stop()
    log = (program.folder / "server.log").read_text()
    assert "{'api_key': '***'} ******" in log and "*** in two parts" in log and KEY not in log
    assert KEY not in repr(server.launch) and KEY not in repr(server.address)


def test_the_key_s_file_goes_with_a_server_that_dies(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("die")
    before = secret_files()
    server = make(KEY)
    server.start()
    with pytest.raises(ServerError) as error:
        server.wait_ready(LIMIT_S)
    assert secret_files() == before and KEY not in str(error.value)


def test_the_guard_removes_the_key_s_file_by_itself(make: Callable[..., SGLangServer], program: Program) -> None:
    program.behave("deaf")
    before = secret_files()
    server = make(KEY)
    server.start()
    assert secret_files() != before
    wait_for(program.pids, "its start")
    os.kill(server.pid, signal.SIGTERM)
    wait_for(lambda: secret_files() == before, "the file's end")  # nobody has asked the server yet


# -- ports --


def test_a_port_in_use_is_the_user_s_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port}: Address already in use; set sglang\.port to another"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_free_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = free_ports("127.0.0.1", 8)
    assert len(set(ports)) == 8 and all(20000 <= port < 32768 for port in ports)
    with pytest.raises(UserError, match=r"192\.0\.2\.1, port 0: Cannot assign requested address"):
        free_ports("192.0.2.1", 1)


def test_urls_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_url("127.0.0.1", 80) == "http://127.0.0.1:80" and server_url("::1", 80) == "http://[::1]:80"
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert reachable_host("10.0.0.1") == "10.0.0.1" and reachable_host("0.0.0.0") == "localhost"
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(UserError, match=r"'no-such-host\.invalid' has no address; set sglang\.host"):
        reachable_host("0.0.0.0")


# -- several servers --


class Managed:
    """A manager of stand-ins, and what it said."""

    def __init__(self, program: Program, model: Path, **settings: object) -> None:
        self.lines: list[str] = []
        config = SGLangConfig(**{"servers": 2, "python": str(program.path), "start_timeout_s": LIMIT_S} | settings)
        self.manager = ServerManager(config, model, "float32", program.folder / "logs", say=self.lines.append)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    return tmp_path / "model"


def test_servers_start_together_and_end_with_the_context(program: Program, model: Path) -> None:
    managed = Managed(program, model)
    with managed.manager as manager:
        addresses = manager.start()
        assert len({address.url for address in addresses}) == 2 and manager.dead() == []
        assert len(managed.lines) == 2
        for index, (line, address) in enumerate(zip(managed.lines, addresses, strict=True)):
            assert line.startswith(f"SGLang server {index}: {address.url}, ready after ")
            assert f"log {program.folder}/logs/server_{index}.log" in line
        commands = [psutil.Process(pid).cmdline() for pid in program.pids()[::2]]
        assert all("--load-format" in command for command in commands)  # the folder has no weights
    assert_nothing_left(program)
    managed.manager.stop()


def test_ports_follow_the_first(program: Program, model: Path) -> None:
    first = free_ports("127.0.0.1", 1)[0]
    with Managed(program, model, port=first).manager as manager:
        assert [a.url for a in manager.start()] == [f"http://127.0.0.1:{first + i}" for i in range(2)]
    with pytest.raises(UserError, match=r"port 65536 of the last server is above 65535"):
        Managed(program, model, port=65535).manager.start()


def test_one_that_fails_ends_the_others(program: Program, model: Path) -> None:
    taken = free_ports("127.0.0.1", 1)[0]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        with pytest.raises(UserError, match=f"port {taken}"):
            Managed(program, model, port=taken - 1).manager.start()
    wait_for(lambda: not living(program.pids()), "the end")
    program.behave("die")
    with pytest.raises(ServerError, match="ValueError: no such model"):
        Managed(program, model).manager.start()
    assert_nothing_left(program)


def test_a_death_is_said_once_and_a_restart_keeps_the_address(
    program: Program, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Managed(program, model, servers=1).manager as manager:
        (address,) = manager.start()
        os.kill(program.pids()[0], signal.SIGKILL)
        wait_for(lambda: manager.dead() == [0], "the death")
        wait_for(lambda: caplog.records, "a word about it")
        time.sleep(1.2)  # more than two looks
        assert len(caplog.records) == 1
        assert f"SGLang server {address.url} was ended by SIGKILL" in caplog.text and "server_0.log" in caplog.text
        manager.restart(0)
        assert manager.dead() == [] and len(living(program.pids())) == 2
        assert address.url.rpartition(":")[2] in psutil.Process(program.pids()[2]).cmdline()
        os.kill(program.pids()[2], signal.SIGKILL)
        wait_for(lambda: len(caplog.records) == 2, "a word about the second death")
    assert len(caplog.records) == 2  # stopping is none


def test_a_death_is_said_also_where_the_caller_sees_it_first(
    program: Program, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gspo_megatron.rollout.sglang.manager._WATCH_S", 1000.0)
    with caplog.at_level(logging.WARNING), Managed(program, model, servers=1).manager as manager:
        manager.start()
        os.kill(program.pids()[0], signal.SIGKILL)
        wait_for(lambda: manager.dead() == [0], "the death")
        manager.restart(0)
        assert len(caplog.records) == 1 and "was ended by SIGKILL" in caplog.text


def test_a_server_that_hangs_is_killed_before_it_is_restarted(
    program: Program, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Managed(program, model, servers=1).manager as manager:
        manager.start()
        hung = program.pids()
        os.kill(hung[0], signal.SIGSTOP)
        assert manager.dead() == []  # the process is there
        manager.restart(0)
        assert not living(hung) and len(living(program.pids())) == 2
    assert not caplog.records  # it was ended on purpose


def test_restarts_in_a_row_are_counted(
    program: Program, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Managed(program, model, servers=1, retries=2).manager as manager:
        manager.start()
        manager.restart(0)
        program.behave("die")
        with pytest.raises(ServerError, match=r"ended again after 2 restarts in a row.*\n.*no such model"):
            manager.restart(0)
        assert len(program.pids()) == 2 * 3
        program.behave()
        with pytest.raises(ServerError, match="2 restarts"):
            manager.restart(0)
        monkeypatch.setattr("gspo_megatron.rollout.sglang.manager._SETTLED_S", 0.0)
        manager.restart(0)  # it had worked for long enough in between
        assert manager.dead() == []


def test_no_retries_means_no_restart(program: Program, model: Path) -> None:
    with Managed(program, model, servers=1, retries=0).manager as manager:
        manager.start()
        with pytest.raises(ServerError, match="after 0 restarts"):
            manager.restart(0)


def test_stopping_while_servers_start(program: Program, model: Path) -> None:
    program.behave("deaf")
    manager = Managed(program, model).manager
    # A shell starts what it puts in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            manager.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    assert_nothing_left(program)


def test_stopping_ends_a_restart(program: Program, model: Path) -> None:
    with Managed(program, model, servers=1, retries=5).manager as manager:
        manager.start()
        program.behave("deaf")
        threading.Timer(1.0, manager.stop).start()
        with pytest.raises(ServerError):
            manager.restart(0)
    assert len(program.pids()) == 2 * 2
    assert_nothing_left(program)


def test_every_server_has_the_same_key(program: Program, model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    with Managed(program, model, api_key_file=str(tmp_path / "key")).manager as manager:
        assert [address.api_key for address in manager.start()] == [KEY, KEY]
