"""Runs over SGLang servers that are killed, and that are asked to stop: the same prompts once, every step once."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from gspo_megatron import tasks
from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.tokenizer import Tokenizer
from tests.system.sglang_setup import Serve, sglang_python, write_model
from tests.system.test_resume import ONE, Run
from tests.system.test_signals import Job

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]
BATCHES = 6
SETTINGS = {"rollout.engine": "sglang", "model.init": "weights", "eval.every": "0", "eval.prompts": "2"}


def check_every_prompt_once(run: Run, batches: int) -> None:
    """Each step has one row, and the prompts that follow those of the step before, `samples_per_prompt` times."""
    assert [row["step"] for row in run.rows()] == list(range(batches + 1))
    assert [row["policy_version"] for row in run.rows()] == [0, *range(batches)]
    assert {row["engine"] for row in run.rows()} == {run.rows()[0]["engine"]} and "sglang" in run.rows()[0]["engine"]
    config = load_config(TrainConfig, run.path / "config.toml")
    task = tasks.build(config.task, Tokenizer.load(config.model.path), seed=config.run.seed)
    size, copies = config.rollout.prompts_per_batch, config.rollout.samples_per_prompt
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    for batch in range(1, batches + 1):
        expected = Counter(prompt.text for prompt in task.prompts("train", (batch - 1) * size, size) * copies)
        assert Counter(line["prompt"] for line in lines if line["step"] == batch) == expected


def test_over_servers_of_others(tmp_path: Path) -> None:
    """The server lives on, with the weights of a later batch than the one that the run resumes from."""
    model = write_model(tmp_path / "model")
    serve = Serve(tmp_path, model)
    try:
        settings = SETTINGS | {"model.path": str(model), "sglang.addresses": serve.wait_ready()}
        run = Run(tmp_path / "broken", ONE, BATCHES, **settings)
        run.kill("train", 3, "0")
        run.kill("reshard", 4, "0")
        job = Job(run.path, ONE, **settings | {"checkpoint.every": "1"})  # which has no last batch
        process = job.start()
        before = job.wait_for_rows(5)
        process.send_signal(signal.SIGTERM)
        assert job.wait() == [75], job.output()
        assert "resuming from" in job.output()
        done = job.check_saved(before)
        assert serve.process.poll() is None and len(serve.guards()) == 1
        run.command += ["--train.rollout_batches", str(done + 1)]
        run.finish()
        check_every_prompt_once(run, done + 1)
    finally:
        serve.process.terminate()
        serve.process.wait(60)


def test_servers_of_the_run_s_own_end_with_it(tmp_path: Path) -> None:
    """Every process but the server's is signalled, as a scheduler does; the server's own ignores SIGUSR1 too."""
    model = write_model(tmp_path / "model")
    settings = SETTINGS | {"model.path": str(model), "sglang.python": str(sglang_python())}
    job = Job(tmp_path / "run" / "run", ONE, **settings)
    (tmp_path / "run").mkdir()
    process = job.start()
    before = job.wait_for_rows(3)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any(p.cmdline()[:1] == ["sglang::scheduler"] for p in family)
    subprocess.run(["kill", "-USR1", str(process.pid), *(str(p.pid) for p in family)], check=True)
    assert job.wait() == [75], job.output()
    done = job.check_saved(before)
    deadline = time.monotonic() + 30
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
        assert time.monotonic() < deadline, "a process of the server outlived the run"
        time.sleep(0.2)
    run = Run(tmp_path / "again", ONE, done + 1, **settings | {"run.folder": str(job.folder)})
    run.path = job.folder
    run.finish()
    check_every_prompt_once(run, done + 1)
