"""What becomes of a run folder when its run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron import run_folder
from gspo_megatron.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SftConfig,
    TaskConfig,
    TrainConfig,
    TrainLoopConfig,
)
from gspo_megatron.errors import UserError


def make(folder: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        run=RunConfig(folder=str(folder), resume=True),
        model=ModelConfig(path="m"),
        task=TaskConfig(name="reasoning_gym", dataset="spell_backward"),
        train=TrainLoopConfig(rollout_batches=2),
    )
    return replace(config, **changes)


def record(folder: Path, *steps: int, rest: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in steps) + rest)
    (folder / "samples.jsonl").write_text("{}\n" * len(steps))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has been prepared, and has a checkpoint."""
    path = tmp_path / "run"
    run_folder.prepare(make(path))
    (path / "checkpoints" / "step_00000001").mkdir(parents=True)
    record(path, 0, 1)
    return path


def test_a_run_with_a_checkpoint_is_kept_and_its_config_replaced(folder: Path) -> None:
    changed = make(folder, train=TrainLoopConfig(rollout_batches=9), parallel=ParallelConfig(data=2))
    changed = replace(changed, data=DataConfig(token_budget=99), optimizer=OptimizerConfig(distributed=False))
    assert run_folder.problems(changed) == []
    run_folder.prepare(changed)
    assert "rollout_batches = 9" in (folder / "config.toml").read_text()
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2
    run_folder.release(changed)
    assert (folder / "config.toml").exists()


def test_a_run_without_a_checkpoint_starts_anew(folder: Path) -> None:
    (folder / "checkpoints" / "step_00000001").rmdir()
    kept = (folder / "metrics.jsonl").read_text()
    for name in ("metrics.jsonl.unused", "metrics.jsonl.unused1"):
        run_folder.prepare(make(folder))
        assert not (folder / "metrics.jsonl").exists() and (folder / "config.toml").exists()
        assert (folder / name).read_text() == kept
        record(folder, 0, 1)


def test_a_run_that_ended_without_a_checkpoint_is_not_begun_anew(folder: Path) -> None:
    (folder / "checkpoints" / "step_00000001").rmdir()
    run_folder.make_way_for_final(folder, 2)
    (folder / "final").mkdir()
    longer = make(folder, train=TrainLoopConfig(rollout_batches=3))
    assert run_folder.is_finished(make(folder)) and not run_folder.is_finished(longer)
    with pytest.raises(UserError, match="has ended after 2 rollout batches, and there is no checkpoint to go on from"):
        run_folder.prepare(longer)
    assert (folder / "metrics.jsonl").exists() and (folder / "final").is_dir()


def test_one_run_at_a_time_in_a_folder(folder: Path) -> None:
    lock = run_folder.prepare(make(folder))
    with pytest.raises(UserError, match=rf"a run is under way in run\.folder={folder} \(process \d+ on .+\); wait for"):
        run_folder.prepare(make(folder))
    lock.close()
    run_folder.prepare(make(folder))
    run_folder.release(make(tmp := folder.parent / "other"))
    assert not tmp.exists()
    assert (folder / ".lock").exists()


def test_leftovers_make_room_before_anything_is_written(folder: Path) -> None:
    (folder / "checkpoints" / ".step_00000002.partial").mkdir()
    run_folder.prepare(make(folder))
    assert not (folder / "checkpoints" / ".step_00000002.partial").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"seed": 3}}, "run.seed=3, but the run in {} was started with 0; set it to that"),
        (
            {"algorithm": AlgorithmConfig(name="grpo")},
            "algorithm.name='grpo', but the run in {} was started with 'gspo'",
        ),
        (
            {"algorithm": AlgorithmConfig(clip_low=1e-3)},
            "algorithm.clip_low=0.001, but the run in {} was started with 0.0003",
        ),
        (
            {"model": ModelConfig(path="m", dtype="bfloat16")},
            "model.dtype='bfloat16', but the run in {} was started with",
        ),
        ({"optimizer": OptimizerConfig(lr=1e-3)}, "optimizer.lr=0.001, but the run in {} was started with 1e-06"),
    ],
)
def test_what_may_not_change(changes: dict[str, Any], said: str, folder: Path) -> None:
    if isinstance(changes.get("run"), dict):
        changes = {"run": RunConfig(folder=str(folder), resume=True, **changes["run"])}
    messages = run_folder.problems(make(folder, **changes))
    assert any(said.format(folder) in message for message in messages)
    alone = run_folder.problems(make(folder, **changes, checkpoint=CheckpointConfig(load="weights")))
    assert bool(alone) == ("optimizer" not in changes)


def test_without_resume_the_way_to_go_on_is_named(folder: Path) -> None:
    [message] = run_folder.problems(make(folder, run=RunConfig(folder=str(folder))))
    assert "--run.resume to go on with it, or --run.overwrite" in message
    (folder / "config.toml").unlink()
    [message] = run_folder.problems(make(folder))
    assert "holds a run without config.toml" in message


def test_sft_is_not_resumed(tmp_path: Path) -> None:
    run = RunConfig(folder=str(tmp_path / "run"), resume=True)
    config = SftConfig(run=run, model=ModelConfig(path="m"), task=TaskConfig(name="jsonl"))
    assert "run.resume=true is read by `train` only" in run_folder.problems(config)[0]
    with pytest.raises(
        UserError, match=r"run\.resume=true keeps the run in the folder, run\.overwrite=true removes it"
    ):
        RunConfig(folder="f", resume=True, overwrite=True)


def test_a_finished_run(folder: Path) -> None:
    longer = make(folder, train=TrainLoopConfig(rollout_batches=3))
    assert not run_folder.is_finished(make(folder))
    run_folder.make_way_for_final(folder, 2)
    assert not run_folder.is_finished(make(folder))
    (folder / "final").mkdir()
    assert run_folder.is_finished(make(folder)) and not run_folder.is_finished(longer)
    record(folder, 0, 1, 2, 3)  # the longer run, killed before it made a new `final`
    assert not run_folder.is_finished(longer)
    run_folder.make_way_for_final(folder, 3)
    assert not (folder / "final").exists() and not run_folder.is_finished(longer)
    (folder / "final").mkdir()
    (folder / "finished").write_text("nonsense\n")
    with pytest.raises(UserError, match="must hold the number of rollout batches that final/ is of, not 'nonsense'"):
        run_folder.is_finished(make(folder))


def test_records_are_cut_to_the_checkpoint(folder: Path) -> None:
    kept = (folder / "metrics.jsonl").read_text()
    record(folder, 0, 1, 2, rest='{"step": 3, "half')
    run_folder.cut_records(folder, len(kept), 3)
    assert (folder / "metrics.jsonl").read_text() == kept and (folder / "samples.jsonl").read_text() == "{}\n"
    for sizes in ((len(kept) + 1, 3), (len(kept) - 1, 3), (len(kept), 99)):
        with pytest.raises(UserError, match="is not what it was when the checkpoint was saved"):
            run_folder.cut_records(folder, *sizes)
    record(folder, 0, 1, 2)
    longer = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="is not what it was"):
        run_folder.cut_records(folder, len(kept), 99)
    assert (folder / "metrics.jsonl").read_text() == longer, "nothing is cut where not all can be"
    (folder / "samples.jsonl").unlink()
    run_folder.cut_records(folder, len(kept), 0)
