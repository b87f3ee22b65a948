"""Preflight of the rollout engine: named servers are asked, started ones have what they need; nothing is started."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

from gspo_megatron.config import (
    GenerationConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.preflight.engine import check_engine, describe_engine, unread_engine_settings
from gspo_megatron.preflight.result import Problems

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/model"


def config(engine: str = "sglang", batch_size: int = 256, **sglang: Any) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=str(QUICKSTART)),
        task=TaskConfig(name="reasoning_gym"),
        rollout=RolloutConfig(engine=engine, batch_size=batch_size),  # type: ignore[arg-type]
        sglang=SGLangConfig(**sglang),
    )


def problem(made: TrainConfig) -> str:
    problems = Problems()
    check_engine(made, problems)
    [message] = problems.messages
    return message


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_server_that_does_not_answer_is_named_with_the_remedy() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    message = problem(config(addresses=url))
    assert url in message and "start it with `serve`, or correct sglang.addresses" in message


def test_a_python_without_sglang_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert "make setup-sglang" in problem(config(python=sys.executable))
    missing = str(tmp_path / "python")
    message = problem(config(python=missing))
    assert missing in message and "make setup-sglang" in message


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"  # says yes to everything: what is looked at here is the port
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = problem(config(python=str(python), port=port))
    assert str(port) in message and "sglang.port" in message


def test_the_embedded_engine_needs_nothing() -> None:
    problems = Problems()
    check_engine(config("embedded", python="nowhere"), problems)
    assert problems.messages == []


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
