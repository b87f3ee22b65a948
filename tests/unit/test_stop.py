"""Signals that ask a process to save and stop, noticed while its main thread is blocked outside Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, sys, time
from gspo_megatron.stop import StopSignals, blocked
with blocked():
    print("born", flush=True)
    time.sleep(0.5)
    with StopSignals().listening() as signals:
        print("ready", flush=True)
        if sys.argv[1] == "ignore":
            time.sleep(0.5)
            signals.ignore()
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # no Python instruction until it returns
        print(signals.received and signals.received.name, flush=True)
"""


def start(mode: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, mode, str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "born\n"
    return process


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_even_before_the_process_listens(number: signal.Signals) -> None:
    process = start("note", 2_000_000)
    process.send_signal(number)
    ready(process)
    process.send_signal(number)  # the same request, passed on by a launcher
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{number.name}\n")
    assert err == f"{number.name}: the run saves and stops after this rollout batch; a second signal ends it at once\n"


def test_a_second_signal_ends_a_process_that_is_blocked() -> None:
    process = start("note", 2**31 - 1)
    ready(process)
    process.send_signal(signal.SIGUSR1)
    time.sleep(2.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1


def test_signals_after_the_end_was_decided_do_nothing() -> None:
    process = start("ignore", 2_000_000)
    ready(process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "None\n", "")
