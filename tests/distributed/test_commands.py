"""The commands in a row, as a user types them: cold start, training from its output, evaluation, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["--eval.prompts", "16", "--eval.every", "1"]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sft_train_eval_report(tmp_path: Path) -> None:
    sft, gspo = tmp_path / "sft", tmp_path / "gspo"
    out = run("sft", "examples/quickstart/sft.toml", "--run.folder", str(sft), "--sft.steps", "2", *SHORT)
    assert "TP2 × EP2" in out and "held-out avg@1" in out

    config = "examples/quickstart/gspo.toml"
    model = ["--model.path", str(sft / "final")]
    replicas = ["--parallel.tensor", "1", "--parallel.data", "2"]
    sizes = ["--rollout.prompts_per_batch", "8", "--train.rollout_batches", "2", "--log.tensorboard", "true"]
    out = run("train", config, *model, "--run.folder", str(gspo), *replicas, *sizes, *SHORT)
    assert "embedded, not SGLang" in out and "DP2 × EP2" in out
    rows = [json.loads(line) for line in (gspo / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["policy_version"] for row in rows] == [0, 0, 1]
    assert all(row["eval_reward_mean"] is not None for row in rows)
    assert rows[1]["old_logprob_gap_first_mini_batch"] <= 1e-6
    samples = [json.loads(line) for line in (gspo / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2}
    assert list((gspo / "tensorboard").iterdir())
    assert (gspo / "final" / "model.safetensors").is_file()

    out = run("eval", config, "--model.path", str(gspo / "final"), "--run.folder", str(gspo), "--eval.prompts", "16")
    assert "held-out avg@1" in out
    run("report", str(gspo))
    assert (gspo / "report.png").stat().st_size > 10_000
    assert "embedded, not SGLang" in (gspo / "report.html").read_text()
