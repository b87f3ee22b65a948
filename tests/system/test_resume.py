"""A run that is killed in every phase and resumed each time ends bit for bit as one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gspo_megatron import checkpoints
from tests.checkpoint_files import differing

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("resume_worker.py")
LIMIT_S = 300.0  # one start of the program
SETTINGS = {
    "model.path": str(ROOT / "examples" / "quickstart" / "model"),
    "model.init": "random",
    "task.reward_threshold": "null",  # partial credit: random weights must have rewards that differ
    "algorithm.mini_batches": "2",
    "rollout.prompts_per_batch": "8",
    "rollout.samples_per_prompt": "4",
    "rollout.max_response_tokens": "8",
    "data.token_budget": "64",
    "eval.every": "3",
    "eval.prompts": "4",
    "log.samples_per_batch": "32",  # every rollout: the prompts that were seen, and what was said to them
    "checkpoint.every": "1",
    "checkpoint.keep_last": "99",
    "run.resume": "true",
}
ONE = {"tensor": 1, "expert": 1}
FOUR = {"tensor": 2, "expert": 2, "data": 2}
STAGES = {"tensor": 2, "expert": 1, "pipeline": 2}


class Run:
    """One run folder, and the command that makes it go on."""

    def __init__(self, folder: Path, layout: dict[str, int], batches: int, **settings: str) -> None:
        folder.mkdir()
        self.folder, self.path = folder, folder / "run"
        values = SETTINGS | {"run.folder": str(self.path), "train.rollout_batches": str(batches)} | settings
        values |= {f"parallel.{name}": str(degree) for name, degree in layout.items()}
        self.command = [word for name, value in values.items() for word in (f"--{name}", value)]
        self.ranks = layout.get("tensor", 1) * layout.get("data", 1) * layout.get("pipeline", 1)

    def start(self, kill: str = "") -> subprocess.CompletedProcess[str]:
        """Run until it ends or is killed; nothing of it is left then."""
        for path in [*self.folder.glob("pid_*"), self.folder / "struck"]:
            path.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "RESUME_FOLDER": str(self.folder),
            "RESUME_RANKS": str(self.ranks),
            "KILL": kill,
        }
        command = [sys.executable, str(WORKER), "train", "examples/quickstart/gspo.toml", *self.command]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        deadline = time.monotonic() + 60
        while left := [path.name for path in self.folder.glob("pid_*") if _is_alive(int(path.read_text()))]:
            assert time.monotonic() < deadline, f"{left} outlived the job"
            time.sleep(0.1)
        return done

    def kill(self, phase: str, batch: int, whom: str) -> None:
        done = self.start(f"{phase}:{batch}:{whom}")
        assert (self.folder / "struck").read_text() == f"{phase} {batch}", done.stdout + done.stderr
        assert done.returncode not in (0, 2), done.stdout + done.stderr

    def finish(self) -> str:
        done = self.start()
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock decides."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        clocked = [name for name in rows[0] if name.startswith("time_")] + ["rollout_tokens_per_s"]
        return [{name: value for name, value in row.items() if name not in clocked} for row in rows]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_equal(broken: Run, whole: Run, batches: int) -> None:
    """Metrics, prompts and responses, weights and optimizer state are bitwise those of the run without a break."""
    assert [row["step"] for row in broken.rows()] == list(range(batches + 1))
    assert broken.rows() == whole.rows()
    assert (broken.path / "samples.jsonl").read_bytes() == (whole.path / "samples.jsonl").read_bytes()
    compared = [path.name for path in checkpoints.complete(whole.path)]
    assert compared == [checkpoints.name_of(b) for b in range(batches, 0, -1)]
    for name in {compared[0], compared[batches // 2]}:
        assert differing(broken.path / "checkpoints" / name, whole.path / "checkpoints" / name) == []
    final = Path("final") / "model.safetensors"
    assert (broken.path / final).read_bytes() == (whole.path / final).read_bytes()
    assert len(whole.rows()) == batches + 1 and whole.rows()[-1]["grad_norm"] > 0


def kills(ranks: int) -> list[tuple[str, int, str]]:
    """(phase, batch, whom): each phase three times, every second time one rank only."""
    plan = [("save", 1), ("rollout", 2), ("logprobs", 2), ("train", 2), ("reshard", 2), ("save_complete", 3)]
    plan += [("rollout", 4), ("logprobs", 4), ("train", 4), ("reshard", 4), ("save_latest", 5)]
    plan += [("rollout", 6), ("logprobs", 7), ("train", 7), ("reshard", 8)]
    # What makes a checkpoint whole is rank 0's work.
    return [
        (phase, batch, "all" if i % 2 else "0" if phase in ("save_complete", "save_latest") else str(i % ranks))
        for i, (phase, batch) in enumerate(plan)
    ]


def test_a_run_that_is_killed_while_it_trains_and_while_it_saves(tmp_path: Path) -> None:
    whole, broken = (Run(tmp_path / name, ONE, 3) for name in ("whole", "broken"))
    whole.finish()
    broken.kill("train", 2, "0")
    broken.kill("save", 2, "0")
    said = broken.finish()
    assert "resuming from" in said and "after 1 rollout batches" in said
    check_equal(broken, whole, 3)
    assert "has finished; nothing is left to do" in broken.finish()
    check_equal(broken, whole, 3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ONE, FOUR], ids=["1 rank", "4 ranks"])
def test_three_kills_in_every_phase(layout: dict[str, int], tmp_path: Path) -> None:
    whole, broken = (Run(tmp_path / name, layout, 8) for name in ("whole", "broken"))
    whole.finish()
    for phase, batch, whom in kills(whole.ranks):
        broken.kill(phase, batch, whom)
    broken.finish()
    check_equal(broken, whole, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("replay", "old_logprobs"), [("r2", "recompute"), ("r3", "auto")])
def test_replay_and_the_engine_s_log_probs_go_on_as_they_were(replay: str, old_logprobs: str, tmp_path: Path) -> None:
    settings = {"model.routing_replay": replay, "algorithm.old_logprobs": old_logprobs}
    whole, broken = (Run(tmp_path / name, ONE, 4, **settings) for name in ("whole", "broken"))
    whole.finish()
    broken.kill("train", 2, "0")
    broken.kill("rollout", 4, "0")
    broken.finish()
    check_equal(broken, whole, 4)
    recomputed = [row["kl_rollout_trainer"] is not None for row in whole.rows()[1:]]
    assert recomputed == ([True] * 4 if replay == "r2" else [True, False, False, False])


@pytest.mark.slow
def test_kills_before_the_first_checkpoint_and_in_a_pipeline(tmp_path: Path) -> None:
    whole, broken = (Run(tmp_path / name, STAGES, 4) for name in ("whole", "broken"))
    whole.finish()
    broken.kill("train", 1, "3")
    broken.kill("reshard", 1, "all")
    broken.kill("logprobs", 3, "1")
    broken.finish()
    check_equal(broken, whole, 4)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Not bitwise, as sums are taken in another order; the same prompts, and every step once."""
    whole = Run(tmp_path / "whole", ONE, 4)
    whole.finish()
    broken = Run(tmp_path / "broken", FOUR, 4)
    broken.kill("train", 3, "2")
    shutil.copytree(broken.path, tmp_path / "copy")
    broken.command = [*broken.command, "--parallel.tensor", "1", "--parallel.data", "1", "--parallel.expert", "1"]
    broken.finish()
    assert [row["step"] for row in broken.rows()] == [0, 1, 2, 3, 4]
    prompts = [[json.loads(s)["prompt"] for s in (r.path / "samples.jsonl").open()] for r in (broken, whole)]
    assert len(prompts[0]) == len(prompts[1]) == 4 * 32 and sorted(prompts[0]) == sorted(prompts[1])
