"""A run's checkpoint folders: their names, which are whole, which are kept. No ranks, no tensors.

RUN/checkpoints/step_00000008/     complete if the name exists
RUN/checkpoints/.step_00000012.partial/     being written, or left by a run that was killed
RUN/checkpoints/latest             the name of the newest
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.checksums import CHECKSUMS, hash_files, list_files, read_checksums

FOLDER, LATEST = "checkpoints", "latest"
TRAINER, RANDOM = "trainer.json", "random.json"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = re.compile(r"\.step_\d{8,}\.partial")


@dataclass(frozen=True)
class TrainerState:
    """Where a run is between two rollout batches, besides tensors.

    Nothing more is needed: sampling has no state, as its seeds are made from the batch's number (experience.py), and at
    a batch's end no rollout is left over for a later one.
    """

    batch: int  # rollout batches done
    policy_version: int  # of the weights that the engines hold
    next_prompt: int  # where the next batch starts in the task's order
    metrics_bytes: int  # of metrics.jsonl, up to this batch
    samples_bytes: int
    optimizer_steps: int
    schedule_steps: int
    engine_logprobs: int = 0  # 1: the engine's log-probabilities passed for old ones (old_logprobs.py)

    @property
    def counts(self) -> dict[str, int]:
        return {"optimizer_steps": self.optimizer_steps, "schedule_steps": self.schedule_steps}


def name_of(batch: int) -> str:
    return f"step_{batch:08d}"


def partial_of(batch: int) -> str:
    return f".{name_of(batch)}.partial"


def folder_of(run: str | Path) -> Path:
    return Path(run) / FOLDER


def batch_of(checkpoint: Path) -> int:
    found = _NAME.fullmatch(checkpoint.name)
    assert found, checkpoint
    return int(found[1])


def complete(run: str | Path) -> list[Path]:
    """Checkpoints under their final names, the newest first. Whether their files are whole, `damage` says."""
    folder = folder_of(run)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=batch_of, reverse=True)


def remove_partial(run: str | Path) -> None:
    """Remove what a killed run had not finished writing."""
    folder = folder_of(run)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name) or path.name == f".{LATEST}.partial":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    _write(folder / TRAINER, json.dumps(asdict(state), indent=2) + "\n")


def read_trainer_state(folder: Path) -> TrainerState:
    """Raises UserError, naming the file, where it is missing or says something else."""
    path = folder / TRAINER
    values = read_json(path)
    names = TrainerState.__dataclass_fields__.keys()
    if (
        not isinstance(values, dict)
        or values.keys() | {"engine_logprobs"} != names  # which older ones lack
        or any(type(v) is not int or v < 0 for v in values.values())
    ):
        raise UserError(f"{path} must hold exactly the counts {', '.join(names)}")
    return TrainerState(**values)


def write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value))


def read_json(path: Path) -> Any:
    """Raises UserError, naming the file, where it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is no training checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def publish(run: str | Path, batch: int) -> Path:
    """Give a complete partial folder its name, then name it in `latest`. All its files are synced already."""
    folder = folder_of(run)
    final = folder / name_of(batch)
    partial = folder / partial_of(batch)
    for path in (*(p for p in partial.iterdir() if p.is_dir()), partial):
        _sync_folder(path)
    partial.rename(final)
    name_latest(run, final)
    _sync_folder(folder.parent)
    return final


def name_latest(run: str | Path, checkpoint: Path) -> None:
    """Have `latest` name a complete checkpoint."""
    folder = folder_of(run)
    pending = folder / f".{LATEST}.partial"
    _write(pending, checkpoint.name + "\n")
    pending.rename(folder / LATEST)
    _sync_folder(folder)


def prune(run: str | Path, *, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest and those of every so many batches."""
    for old in complete(run)[keep_last:]:
        if keep_every == 0 or batch_of(old) % keep_every:
            # Under a name that nobody takes for a checkpoint while it goes.
            doomed = old.with_name(f".{old.name}.partial")
            old.rename(doomed)
            shutil.rmtree(doomed)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged or overtaken checkpoint, so that its name is free for the one to come."""
    number = 0
    while (other := checkpoint.with_name(f"{checkpoint.name}.unused{number or ''}")).exists():
        number += 1
    checkpoint.rename(other)
    return other


def damage(checkpoint: Path, *, reader: int = 0, readers: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each. Of `readers`, each reads its share of the files."""
    try:
        expected = read_checksums(checkpoint)
    except UserError as error:
        return [str(error)] if reader == 0 else []
    found = set(list_files(checkpoint))
    lines = []
    if reader == 0:
        lines += [f"{checkpoint / name} is missing" for name in sorted(expected.keys() - found)]
        lines += [f"{checkpoint / name} is not in {CHECKSUMS}" for name in sorted(found - expected.keys())]
    mine = sorted(expected.keys() & found)[reader::readers]
    for name in mine:
        size = (checkpoint / name).stat().st_size
        if size != expected[name].size:
            lines.append(f"{checkpoint / name} has {size} bytes, should have {expected[name].size}")
        elif hash_files(checkpoint, [name])[name] != expected[name]:
            lines.append(f"{checkpoint / name} is damaged: its xxh3-128 is not that of {CHECKSUMS}")
    return lines


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
