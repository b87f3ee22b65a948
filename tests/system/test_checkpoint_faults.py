"""Checkpoints that can't be written or are damaged: it is said, and the one before is used."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron import checkpoints
from tests.system.test_resume import ONE, ROOT, Run

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
MiB = 2**20


def names(run: Run) -> list[str]:
    return [path.name for path in checkpoints.complete(run.path)]


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", ONE, 4)
    whole.finish()
    broken = Run(tmp_path / "broken", ONE, 4)
    shutil.copytree(whole.path, broken.path)
    shutil.rmtree(broken.path / "final")
    newest, older, oldest, first = checkpoints.complete(broken.path)
    os.truncate(newest / "__0_0.distcp", 1000)
    content = bytearray((older / "__0_0.distcp").read_bytes())
    content[3 * MiB] ^= 1
    (older / "__0_0.distcp").write_bytes(content)
    (oldest / ".metadata").unlink()
    done = broken.start()
    assert done.returncode == 0
    for path, why in ((newest, "has 1000 bytes"), (older, "is damaged"), (oldest, ".metadata is missing")):
        assert f"checkpoint {path.name} is damaged, the one before it is tried: " in done.stderr
        assert why in done.stderr
    assert f"resuming from {first}" in done.stdout
    assert broken.rows() == whole.rows() and len(names(broken)) == 4
    assert len(list((broken.path / "checkpoints").glob("*.unused"))) == 3


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_starts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ONE, 2)
    run.finish()
    shutil.rmtree(run.path / "final")
    before = (run.path / "metrics.jsonl").read_bytes()
    for path in checkpoints.complete(run.path):
        os.truncate(path / "trainer.json", 10)
    done = run.start()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"no checkpoint in {run.path / 'checkpoints'} is whole" in done.stderr
    assert all(f"{name}/trainer.json has 10 bytes" in done.stderr for name in names(run))
    assert (run.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_what_may_not_change_is_named_with_both_values(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ONE, 1)
    run.finish()
    run.command += ["--run.seed", "5", "--algorithm.clip_high", "0.045", "--train.rollout_batches", "2"]
    done = run.start()
    assert done.returncode == 2
    assert "run.seed=5, but the run in " in done.stderr and "was started with 11" in done.stderr
    assert "algorithm.clip_high=0.045" in done.stderr and "was started with 0.04" in done.stderr
    run.command += ["--run.seed", "11", "--algorithm.clip_high", "0.04", "--data.token_budget", "128"]
    run.finish()
    assert [row["step"] for row in run.rows()] == [0, 1, 2]


def start_with_file_limit(run: Run, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """No file may become larger: what a full disk does to the large ones, metrics still fit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gspo_megatron", "train", "examples/quickstart/gspo.toml", *run.command],
        cwd=ROOT,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_checkpoint_that_does_not_fit_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ONE, 1)
    run.finish()
    before = checkpoints.complete(run.path)
    shutil.rmtree(run.path / "final")
    run.command += ["--train.rollout_batches", "3"]
    done = start_with_file_limit(run, 4 * MiB)  # a checkpoint has 6.6 MB, the weights 2 MB
    assert done.returncode == 0, done.stdout + done.stderr
    for batch in (2, 3):
        assert f"the checkpoint of rollout batch {batch} could not be saved: rank 0: " in done.stderr
    assert "File too large. The newest is step_00000001; the run goes on" in done.stderr
    assert checkpoints.complete(run.path) == before and checkpoints.damage(before[0]) == []
    assert [row["step"] for row in run.rows()] == [0, 1, 2, 3] and (run.path / "final").is_dir()
    assert not list((run.path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_run_that_cannot_be_saved_when_it_is_to_stop_fails(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ONE, 10**6, **{"checkpoint.deadline_s": "1", "checkpoint.every": "0"})
    done = start_with_file_limit(run, 4 * MiB)
    assert done.returncode == 1
    assert "stopped on the deadline after rollout batch" in done.stderr and "could not be saved" in done.stderr
