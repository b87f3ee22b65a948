"""The quick start's training with the native kernels and with their definition: one run, by different operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
NATIVE = ("linear_logprobs", "linear_gradients", "sequence_policy_loss", "sequence_mean")
BATCHES = 2
# Of a run: what the clock says, and what counts bytes or tokens a second.
CLOCK = ("time_", "rollout_tokens_per_s", "reshard_bytes")


def train(folder: Path, implementation: str) -> tuple[list[dict[str, Any]], str]:
    """Metrics of the rollout batches, and the profile of the last, on rank 0."""
    quickstart = (ROOT / "examples/quickstart/gspo.toml").read_text()
    # The data set's partial credit: random weights earn no exact match, and without rewards nothing is learnt.
    config = folder.with_suffix(".toml")
    config.write_text(quickstart.replace("reward_threshold", "# reward_threshold"))
    command = [sys.executable, "-m", "gspo_megatron", "train", str(config), "--run.folder", str(folder)]
    command += ["--model.path", str(ROOT / "examples/quickstart/model"), "--model.init", "random"]
    command += ["--train.rollout_batches", str(BATCHES), "--log.profile_batch", str(BATCHES), "--eval.prompts", "8"]
    command += ["--kernels.implementation", implementation]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[1:], (folder / "profile" / f"batch_{BATCHES}.rank_0.txt").read_text()


def test_native_and_reference_are_one_run(tmp_path: Path) -> None:
    (native, native_profile), (reference, reference_profile) = (
        train(tmp_path / name, name) for name in ("native", "reference")
    )
    assert len(native) == BATCHES and native[-1]["grad_norm"] > 0 and native[-1]["reward_std"] > 0
    for ours, truth in zip(native, reference, strict=True):
        assert ours.keys() == truth.keys()
        for name, value in truth.items():
            if isinstance(value, str) or value is None:
                assert ours[name] == value, name
            elif not name.startswith(CLOCK):
                # Log ratios and what follows from them are differences of log-probabilities of about 5.
                assert ours[name] == pytest.approx(value, rel=2e-4, abs=3e-6), name
    for name in NATIVE:
        assert f"gspo_megatron::{name}" in native_profile and f"gspo_megatron::{name}" not in reference_profile
    assert json.loads((tmp_path / f"native/profile/batch_{BATCHES}.rank_1.json").read_text())["traceEvents"]
