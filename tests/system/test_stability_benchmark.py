"""The stability benchmark for real, at its smallest: cells are runs of the project's own commands."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.stability.benchmark.measurements import measured_names

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


def command(folder: Path, *further: str) -> list[str]:
    tool = str(ROOT / "tools/stability_benchmark.py")
    return [sys.executable, tool, "--preset", "smoke", "--folder", str(folder), *further]


def claims(folder: Path) -> dict[str, Any]:
    return {c["name"]: c for c in json.loads((folder / "report" / "report.json").read_text())["claims"]}


@pytest.mark.timeout(600)
def test_a_measurement_follows_its_cold_start(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "b", "--experiment", "lengths"), cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = claims(tmp_path / "b")
    assert math.isfinite(found["log_s"]["mean"]) and list(found["log_s"]["by_seed"]) == ["201"]
    assert found["log_s"]["verdict"] == "undecided", "one seed decides nothing"
    assert found["gap"]["mean"] is None and found["gap"]["verdict"] == "undecided"
    [result] = [json.loads(p.read_text()) for p in (tmp_path / "b" / "cells").glob("measure-*/result.json")]
    values = result["values"]
    assert (set(values), set(result["curves"])) == measured_names("lengths")
    assert values["update_slope_std_log_w"] == pytest.approx(values["update_slope_std_log_s"] + 1), "log W is T log s"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    process = subprocess.Popen(command(folder), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while len(list(folder.glob("cells/*/result.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}
    assert len(before) < 7
    done = subprocess.run(command(folder), cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not run again"
    assert len(list(folder.glob("cells/*/result.json"))) == 7
    # A run that had finished just before the kill is taken over, and not run again either.
    assert 1 <= done.stdout.count("] done in") <= 7 - len(before)
    found = claims(folder)
    assert len(found["gap"]["by_seed"]) == 2 and found["gap"]["mean"] > 0
    page = (folder / "report" / "report.html").read_text()
    assert "GSPO clips at least 10 times" in page and "Nothing: every cell is done." in page


def measured(folder: Path, settings: dict[str, str]) -> dict[str, float]:
    """Values that `measure` finds of a random model, over the ranks of the quick start's config."""
    fixed = {"model.path": "examples/quickstart/model", "model.init": "random", "run.folder": str(folder)}
    words = [word for key, value in (fixed | settings).items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "gspo_megatron", "measure", "examples/quickstart/gspo.toml", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    values: dict[str, float] = json.loads((folder / "measurement.json").read_text())["values"]
    return values


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flips_and_precision_of_a_random_model_over_two_ranks(tmp_path: Path) -> None:
    """The base config is tensor and expert parallel over two ranks."""
    small = {"measure.prompts": "16", "measure.response_tokens": "64"}
    found = {what: measured(tmp_path / what, {"measure.what": what, **small}) for what in ("flips", "precision")}
    flips, precision = found["flips"], found["precision"]
    assert set(flips) == measured_names("flips")[0] and set(precision) == measured_names("precision")[0]
    assert 0 < flips["flip_0.01_token_rms"] < flips["flip_0.1_token_rms"] < flips["flip_1_token_rms"]
    assert 0 < flips["flip_0.1_rms_ratio"] < 1
    assert precision["engine_kl"] < 1e-9 < precision["fp8_kl"], "the same weights, and rounded ones"
    assert precision["flip_0.01_kl"] < precision["flip_0.1_kl"]
    assert precision["bias_0.001_negative"] == 1 and precision["bias_0.001_positive"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm.name": "cispo"},  # divides by the tokens of the global batch
        {"algorithm.name": "minirl"},  # has a mismatch weight of its own
        {"algorithm.name": "gspo", "algorithm.kl_coefficient": "0.1"},  # needs the reference model
        {"algorithm.name": "gspo", "model.routing_replay": "r3"},  # needs the engine's routes
    ],
    ids=["cispo", "minirl", "kl", "r3"],
)
def test_the_update_that_is_measured_is_any_objectives(settings: dict[str, str], tmp_path: Path) -> None:
    small = {
        "task.reward_threshold": "null",  # partial credit: random weights must have rewards that differ
        "parallel.tensor": "1",
        "parallel.expert": "1",
        "algorithm.clip_low": "null",
        "algorithm.clip_high": "null",
        "algorithm.mini_batches": "2",
        "rollout.prompts_per_batch": "8",
        "measure.what": "lengths",
        "measure.prompts": "8",
        "measure.response_tokens": "64",
        "measure.skip_tokens": "8",
        "measure.updates": "1",
    }
    values = measured(tmp_path / "run", small | settings)
    assert values["update_token_ratio_max_growth"] > 1, "an update changes ratios: without one all are 1"
