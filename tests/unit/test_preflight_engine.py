"""Preflight of the rollout engine: named servers are asked, started ones have what they need; nothing is started."""

from __future__ import annotations

import contextlib
import http.server
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.config import (
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.preflight.engine import check_engine, describe_engine, unread_engine_settings
from gspo_megatron.preflight.result import Problems

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/model"


def config(engine: str = "sglang", batch_size: int = 256, ranks: int = 1, **sglang: Any) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=str(QUICKSTART)),
        task=TaskConfig(name="reasoning_gym"),
        parallel=ParallelConfig(data=ranks),
        rollout=RolloutConfig(engine=engine, batch_size=batch_size),  # type: ignore[arg-type]
        sglang=SGLangConfig(**sglang),
    )


def problems_of(made: TrainConfig) -> list[str]:
    problems = Problems()
    check_engine(made, problems)
    return problems.messages


def problem(made: TrainConfig) -> str:
    [message] = problems_of(made)
    return message


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A program that says yes to everything."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return str(path)


@contextlib.contextmanager
def answering(status_of: dict[str, int], *, otherwise: int = 200) -> Iterator[str]:
    """A server that answers {} with these statuses; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status_of.get(self.path, otherwise))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_server_that_does_not_answer_is_named_with_the_remedy() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    message = problem(config(addresses=url))
    assert url in message and "start it with `serve`, or correct sglang.addresses" in message


@pytest.mark.parametrize("remedy", ["sglang.addresses", "sglang.api_key_file"])
def test_a_key_is_asked_for_where_the_server_asks_for_one(remedy: str) -> None:
    """And not where an address holds 401, the status that asks for one."""
    if remedy == "sglang.addresses":
        message = problem(config(addresses="http://127.0.0.1:1,http://no401.invalid:1"))
    else:
        with answering({}, otherwise=401) as url:
            message = problem(config(addresses=url))
    assert message.count("sglang.a") == 1 and remedy in message


def test_a_router_must_be_there() -> None:
    nobody = f"http://127.0.0.1:{free_port()}/"
    with answering({}) as server, answering({"/model_info": 404}) as router, answering({}, otherwise=404) as another:
        assert problems_of(config(addresses=server, router=router + "/")) == []
        for url in (nobody, another):
            message = problem(config(addresses=server, router=url))
            assert f"{url.rstrip('/')}: /health_generate failed" in message and "correct sglang.router" in message
    # All servers paused, by a run that was killed: the next one lets them go on.
    with answering({}) as server, answering({}, otherwise=503) as router:
        assert problems_of(config(addresses=server, router=router)) == []


def test_a_router_needs_servers_that_it_can_know(python: str) -> None:
    message = problem(config(python=python, router="http://127.0.0.1:9"))
    assert "sglang.router=http://127.0.0.1:9 does not know" in message and "sglang.addresses" in message


def test_a_python_without_sglang_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert "make setup-sglang" in problem(config(python=sys.executable))
    missing = str(tmp_path / "python")
    message = problem(config(python=missing))
    assert missing in message and "make setup-sglang" in message


def test_a_port_in_use_is_named(python: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = problem(config(python=python, port=port))
    assert str(port) in message and "sglang.port" in message


def test_servers_take_the_gpus_behind_the_ranks_of_this_machine(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    two_nodes = config(python=python, tensor=4, ranks=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert problems_of(two_nodes) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert "from GPU 6 on need 10 GPUs, but 8 are visible" in problem(two_nodes)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "from GPU 8 on need 12 GPUs, but 8 are visible" in problem(two_nodes)


def test_the_embedded_engine_needs_nothing() -> None:
    assert problems_of(config("embedded", python="nowhere")) == []


def test_the_engine_is_described() -> None:
    assert describe_engine(config("embedded")) == "embedded, not SGLang"
    assert "2 servers of TP4 started on this machine; weights over tensor" in describe_engine(
        config(servers=2, tensor=4, transport="tensor")
    )
    assert "http://a:1 and http://b:2" in describe_engine(config(addresses="http://a:1, http://b:2/"))


def test_settings_of_the_other_engine_are_said_to_be_unread() -> None:
    assert unread_engine_settings(config()) == unread_engine_settings(config("embedded")) == []
    [said] = unread_engine_settings(config("embedded", transport="disk"))
    assert "sglang.transport is not read" in said
    [said] = unread_engine_settings(config(batch_size=GenerationConfig.batch_size + 1))
    assert "rollout.batch_size" in said and "sglang.max_concurrent" in said
