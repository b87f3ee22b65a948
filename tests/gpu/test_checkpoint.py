"""Checkpoints on a GPU: written by a forked process from copies in host memory, and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_megatron import checkpoints
from gspo_megatron.failures import EXIT_DONE, EXIT_STOPPED
from tests.system.test_resume import ONE, ROOT, SETTINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def train(folder: Path, *, exit_code: int = EXIT_DONE, **settings: str) -> str:
    # The same number of batches in every start: the learning rate's schedule hangs on it.
    values = SETTINGS | {"run.folder": str(folder), "train.rollout_batches": "3"} | settings
    values |= {f"parallel.{name}": str(degree) for name, degree in ONE.items()}
    overrides = [word for name, value in values.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron", "train", "examples/quickstart/gspo.toml", *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "settings",
    [{}, {"model.dtype": "bfloat16"}, {"model.dtype": "bfloat16", "memory.offload_optimizer": "1.0"}],
    ids=["float32", "bfloat16", "offloaded"],
)
def test_a_run_on_a_gpu_is_saved_and_resumed(settings: dict[str, str], tmp_path: Path) -> None:
    train(tmp_path / "run", exit_code=EXIT_STOPPED, **settings, **{"checkpoint.deadline_s": "1"})
    assert [checkpoints.batch_of(path) for path in checkpoints.complete(tmp_path / "run")] == [1]
    assert all(checkpoints.damage(path) == [] for path in checkpoints.complete(tmp_path / "run"))
    assert "after 1 rollout batch" in train(tmp_path / "run", **settings)
    train(tmp_path / "whole", **settings)
    rows, whole = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    # Atomic sums on a GPU come in any order: not bitwise, but lost moments would show.
    assert rows[3]["grad_norm"] == pytest.approx(whole[3]["grad_norm"], rel=0.05)
    assert rows[3]["learning_rate"] == whole[3]["learning_rate"]
