"""`serve`: what a user can get wrong ends with 2 and one message, before any server is started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = """
[run]
folder = "{folder}"
[model]
path = "{model}"
init = "random"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[sglang]
addresses = "http://127.0.0.1:1"  # as pasted after an earlier start: for the trainer, not for serve
python = "{python}"
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPO_SGLANG_API_KEY", raising=False)


@pytest.fixture
def handlers() -> object:
    """serve sets handlers of its own, as the program of its process may."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path, handlers: object) -> Path:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || touch {tmp_path}/started\n')
    python.chmod(0o755)
    path = tmp_path / "train.toml"
    model = ROOT / "examples" / "quickstart" / "model"
    path.write_text(CONFIG.format(folder=tmp_path / "run", model=model, python=python))
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    return err


def test_a_config_file_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "serve needs a config file first" in refusal(capsys)
    assert "does not exist" in refusal(capsys, "no-such.toml")


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        "serve CONFIG.toml" in text and "--sglang.tensor" in text and "--sglang.api-key-file" in text.replace("_", "-")
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--sglang.sever", "2"], 'unknown option "--sglang.sever"'),
        (["--sglang.tensor", "3"], "sglang.tensor=3 must divide num_attention_heads=4"),
        (["--sglang.tensor", "4", "--sglang.expert", "3"], "sglang.expert=3 must divide sglang.tensor=4"),
        (["--sglang.python", "no/such/python"], "sglang.python=no/such/python: there is no such program"),
        (["--sglang.python", sys.executable], "has no SGLang; run `make setup-sglang`"),
        (["--sglang.api_key_file", "no/such/file"], "sglang.api_key_file=no/such/file cannot be read"),
        (["--sglang.host", "0.0.0.0"], "need a key that the trainer has too: make one with"),
        (
            ["--sglang.host", "192.0.2.1", "--sglang.port", "5000", "--sglang.api_key_file", "KEY"],
            "no server can listen",
        ),
        (["--sglang.arguments=--api-key x"], "sglang.arguments may not set --api-key; use sglang.api_key_file"),
        (["--model.path", "no/such"], "no/such holds no config.json"),
    ],
)
def test_what_is_refused(config: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str) -> None:
    key = config.with_name("key")
    key.write_text("a-key\n")
    overrides = [str(key) if word == "KEY" else word for word in overrides]
    assert expected in refusal(capsys, str(config), *overrides)
    assert not config.with_name("started").exists() and not config.with_name("run").exists()


def test_a_port_in_use(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        message = refusal(capsys, str(config), "--sglang.port", port)
    assert f"port {port}: Address already in use" in message and "sglang.port" in message


def test_a_server_that_ends_at_once_is_no_user_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(config)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("error: SGLang server http://127.0.0.1:") and "it ended with exit code 0" in err
    assert config.with_name("started").exists()


def test_the_process_ends_with_2_and_only_the_message(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron", "serve", str(config), "--sglang.host", "0.0.0.0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sglang.host=0.0.0.0") and done.stderr.count("\n") == 1
