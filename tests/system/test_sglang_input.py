"""A server that serves another model is refused before it is used: one message with the remedy, exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.manager import ServerManager
from tests.system.sglang_setup import ROOT, sglang_python, write_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

CONFIG = """
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[rollout]
engine = "sglang"
max_response_tokens = 8
[train]
rollout_batches = 1
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrower than what is trained, with the same names."""
    return write_model(tmp_path_factory.mktemp("models") / "served", hidden=32)


@pytest.fixture(scope="module")
def server(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerAddress]:
    config = SGLangConfig(python=str(sglang_python()))
    with ServerManager(config, served, "float32", tmp_path_factory.mktemp("logs")) as manager:
        yield manager.start()[0]


def train(folder: Path, model: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    config = folder / "config.toml"
    config.write_text(f'[run]\nfolder = "{folder}/run"\n[model]\npath = "{model}"\n{CONFIG}')
    return subprocess.run(
        [sys.executable, "-m", "gspo_megatron", "train", str(config), *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(done: subprocess.CompletedProcess[str], *, warning: str = "") -> str:
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if warning:
        assert warning in said.pop(0), done.stderr
    assert len(said) == 1 and said[0].startswith("error: "), done.stderr
    return said[0]


def test_another_model_missing_parameters_and_other_shapes(server: ServerAddress, served: Path, tmp_path: Path) -> None:
    """In this order: the last one is found out by the server, which then holds no usable weights."""
    same_names = write_model(tmp_path / "wider", hidden=64)
    deeper = write_model(tmp_path / "deeper", hidden=32, layers=4)
    at = ("--sglang.addresses", server.url)

    said = refusal(train(tmp_path, same_names, *at))
    assert "hidden_size=32 instead of 64" in said and "start the server with the same model" in said

    (served / "config.json").rename(served / "config.json.away")  # as where the server's disk can't be read from here
    try:
        unread = "config.json cannot be read here"
        said = refusal(train(tmp_path, deeper, *at), warning=unread)
        assert "it lacks 9 (" in said and "model.layers.3." in said

        said = refusal(train(tmp_path, same_names, *at, "--sglang.transport", "tensor"))
        assert unread in said and 'sglang.transport="tensor"' in said

        said = refusal(train(tmp_path, same_names, *at), warning=unread)
        assert "other shapes than model.path" in said and server.url in said
    finally:
        (served / "config.json.away").rename(served / "config.json")


def test_sglang_must_be_installed_and_ports_free(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    said = refusal(train(tmp_path, model, "--sglang.python", sys.executable))
    assert "make setup-sglang" in said
    said = refusal(train(tmp_path, model, "--sglang.python", str(tmp_path / "none")))
    assert "make setup-sglang" in said
