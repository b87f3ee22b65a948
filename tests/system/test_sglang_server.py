"""Real SGLang servers on the CPU: `serve` as a user runs it, its key, deaths and restarts, and what stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.manager import ServerManager
from tests.system.sglang_setup import START_S, Serve, sglang_python, write_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

END_S = 60.0
KEY = "0123456789abcdef-the-key"
PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def ask(address: ServerAddress, path: str, content: dict[str, object] | None = None) -> dict:
    headers = {"Content-Type": "application/json"}
    if address.api_key is not None:
        headers["Authorization"] = f"Bearer {address.api_key}"
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address.url + path, data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def generate(address: ServerAddress, **options: object) -> dict:
    params = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    return ask(address, "/generate", {"input_ids": PROMPT, "sampling_params": params} | options)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    assert not alive, f"still there: {[(p.pid, p.cmdline()) for p in alive]}"


@pytest.fixture
def serves() -> Iterator[list[Serve]]:
    started: list[Serve] = []
    yield started
    for serve in started:
        if serve.process.poll() is None:
            serve.process.kill()  # its servers end with it
            serve.process.wait()


def test_serve_with_a_key_survives_a_death_and_leaves_nothing(tmp_path: Path, model: Path, serves: list[Serve]) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    serves.append(serve := Serve(tmp_path, model, "--sglang.api_key_file", str(tmp_path / "key")))
    address = ServerAddress(serve.wait_ready(), KEY)
    assert f"key from sglang.api_key_file={tmp_path}/key" in serve.read("stdout")

    answer = generate(address)
    assert len(answer["output_ids"]) == 8
    for wrong in (None, "another", KEY[:-1]):
        for path in ("/generate", "/model_info", "/server_info", "/pause_generation"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(ServerAddress(address.url, wrong), path, {} if path[1] in "gp" else None)
    logs = list((tmp_path / "run" / "servers").rglob("*.log"))
    assert len(logs) == 1 and "'api_key': '***'" in logs[0].read_text()

    # A server whose scheduler is killed ends as a whole, and is started again at the same address.
    before = serve.family()
    os.kill(serve.scheduler().pid, signal.SIGKILL)
    wait_until_gone(before)
    serve.wait_ready(times=2)
    assert generate(address)["output_ids"] == answer["output_ids"]
    assert "ended" in serve.read("stderr") and "Traceback" not in serve.read("stderr")

    # What anybody on this machine, or a reader of the output, could see.
    assert KEY not in "".join(" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    for text in (*map(serve.read, ("stdout", "stderr")), logs[0].read_text()):
        assert KEY not in text

    family = serve.family()
    assert len(family) >= 4  # guard, server, scheduler, detokenizer
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(END_S) == 0
    assert serve.read("stdout").endswith("stopped\n")
    wait_until_gone(family)


def test_a_killed_serve_leaves_nothing_and_a_port_in_use_is_refused(
    tmp_path: Path, model: Path, serves: list[Serve]
) -> None:
    serves.append(serve := Serve(tmp_path, model))
    url = serve.wait_ready()
    (tmp_path / "second").mkdir()
    second = Serve(tmp_path / "second", model, "--sglang.port", url.rpartition(":")[2])
    serves.append(second)
    assert second.process.wait(END_S) == 2
    assert re.fullmatch(r"error: .*Address already in use; set sglang\.port .*\n", second.read("stderr"))

    family = serve.family()
    serve.process.kill()
    wait_until_gone(family)


@pytest.mark.slow
def test_tensor_parallel_with_routed_experts_and_random_weights(tmp_path: Path, model: Path) -> None:
    config = SGLangConfig(python=str(sglang_python()), tensor=2, routed_experts=True, start_timeout_s=START_S)
    with ServerManager(config, model, "float32", tmp_path, random_weights=True) as manager:
        (address,) = manager.start()
        info = ask(address, "/server_info")
        assert (info["tp_size"], info["load_format"]) == (2, "dummy")
        answer = generate(address, return_routed_experts=True, return_logprob=True)
        assert len(answer["output_ids"]) == 8 and answer["meta_info"]["routed_experts"]
        family = psutil.Process().children(recursive=True)
        assert len([p for p in family if p.cmdline()[0].startswith("sglang::scheduler")]) == 2
    wait_until_gone(family)


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path, model: Path, serves: list[Serve]) -> None:
    serves.append(serve := Serve(tmp_path, model, "--sglang.arguments=--load-format no_such_format"))
    assert serve.process.wait(START_S) == 1
    assert "no_such_format" in serve.read("stderr") and "Traceback" not in serve.read("stderr")
