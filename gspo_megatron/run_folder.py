"""The run folder: what a run may write into, made before the ranks start and given back if nothing came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gspo_megatron import checkpoints
from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.config_io import dump_config, load_config
from gspo_megatron.errors import UserError

CONFIG_FILE = "config.toml"
RECORDS = ("metrics.jsonl", "samples.jsonl")
FINAL = "final"
FINISHED = "finished"  # the rollout batches that `final` is of
LOCK = ".lock"
SAVED_FOLDERS = (FINAL, "tensorboard", "profile", checkpoints.FOLDER)
RUN_FILES = (CONFIG_FILE, *RECORDS, FINISHED, "report.html", "report.png")


def problems(config: TrainConfig | SftConfig) -> list[str]:
    """What speaks against this run folder: it holds another run, or something a run has not made."""
    folder = Path(config.run.folder)
    if config.run.resume and not isinstance(config, TrainConfig):
        return ["run.resume=true is read by `train` only: sft saves its weights at its end; leave it out"]
    if folder.is_symlink() and not folder.exists():
        return [
            f"run.folder={folder} is a symbolic link to {os.readlink(folder)}, which does not exist; "
            "make that folder, or give another one"
        ]
    if folder.exists() and not folder.is_dir():
        return [f"run.folder={folder} is a file; give a folder"]
    if folder.exists() and folder.resolve() == Path(config.model.path).resolve():
        return [f"run.folder={folder} is the model's own folder, model.path; give another folder"]
    found = [name for name in (CONFIG_FILE, *RECORDS, *SAVED_FOLDERS) if os.path.lexists(folder / name)]
    if config.run.resume:
        return [*_changes(config), *_nothing_to_resume(folder)] if found else []
    if not config.run.overwrite:
        if not found:
            return []
        resumes = ", --run.resume to go on with it" if isinstance(config, TrainConfig) else ""
        return [
            f"run.folder={folder} already holds a run ({', '.join(found)}); give another folder{resumes}, "
            "or --run.overwrite to replace its files"
        ]
    messages = list(_not_removable(folder))
    # What is removed must not be what is read.
    model = Path(config.model.path).resolve()
    if any(model.is_relative_to((folder / name).resolve()) for name in SAVED_FOLDERS):
        messages.append(
            f"model.path={config.model.path} lies in run.folder={folder}, which run.overwrite would replace; "
            "give another run folder"
        )
    return messages


# What may not change when a run is resumed, by section; a set holds the exceptions.
_FIXED: dict[str, set[str]] = {
    "model": {"experts", "attention"},
    "task": {"reward_timeout_s", "reward_workers"},
    "algorithm": {"allow_unusual_clip"},
    "rollout": {"batch_size"},
    "optimizer": {"distributed", "overlap_grad_reduce", "overlap_param_gather"},
}
_WITH_WEIGHTS_ALONE = "optimizer"  # may change under checkpoint.load = "weights"


def _nothing_to_resume(folder: Path) -> list[str]:
    """A run that has ended, and left nothing to go on from, is not begun anew in its own folder."""
    if checkpoints.complete(folder) or not (folder / FINAL).exists():
        return []
    batches = _finished(folder) or "its"
    return [
        f"run.resume: the run in {folder} has ended after {batches} rollout batches, and there is no checkpoint to go "
        "on from (checkpoint.every was 0); start another from its final/ in another run.folder, or replace it by "
        "--run.overwrite"
    ]


def _changes(config: TrainConfig | SftConfig) -> list[str]:
    """What the folder's run was started with and may not change in its middle, with both values."""
    folder = Path(config.run.folder)
    if not (folder / CONFIG_FILE).is_file():
        return [f"run.folder={folder} holds a run without {CONFIG_FILE}, which can't be resumed; give another folder"]
    assert isinstance(config, TrainConfig)
    before, now = load_config(TrainConfig, folder / CONFIG_FILE), resolve(config)
    pairs = [("run", "seed", before.run.seed, now.run.seed)]
    for section, free in _FIXED.items():
        if section == _WITH_WEIGHTS_ALONE and config.checkpoint.load == "weights":
            continue
        old, new = getattr(before, section), getattr(now, section)
        names = (f.name for f in dataclasses.fields(new) if f.name not in free)
        pairs += [(section, name, getattr(old, name), getattr(new, name)) for name in names]
    return [
        f"run.resume: {section}.{name}={new!r}, but the run in {folder} was started with {old!r}; set it to that, or "
        "give another run.folder"
        for section, name, old, new in pairs
        if old != new and not (name == "path" and Path(str(old)).resolve() == Path(str(new)).resolve())
    ]


def is_finished(config: TrainConfig | SftConfig) -> bool:
    """Whether run.resume finds nothing left to do: the weights after all rollout batches are saved."""
    folder = Path(config.run.folder)
    if not (isinstance(config, TrainConfig) and config.run.resume and (folder / FINAL).is_dir()):
        return False
    batches = _finished(folder)
    return batches is not None and batches >= config.train.rollout_batches


def _finished(folder: Path) -> int | None:
    path = folder / FINISHED
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{path} must hold the number of rollout batches that {FINAL}/ is of, not {text[:40]!r}")
    return int(text)


def cut_records(folder: str | Path, metrics_bytes: int, samples_bytes: int) -> None:
    """Cut the records to where a checkpoint was taken: later batches are made again.

    Raises:
        UserError: they are shorter than that, or no record ends there.
    """
    sizes = {Path(folder) / name: size for name, size in zip(RECORDS, (metrics_bytes, samples_bytes), strict=True)}
    for path, size in sizes.items():
        content = path.read_bytes()[:size] if path.is_file() else b""
        if len(content) < size or (content and not content.endswith(b"\n")):
            raise UserError(
                f"{path} is not what it was when the checkpoint was saved: its first {size} bytes must be whole lines. "
                "Put it back, or give another run.folder"
            )
    for path, size in sizes.items():
        if path.is_file():
            os.truncate(path, size)


def make_way_for_final(folder: str | Path, batches: int) -> None:
    """Before `final` is made of the weights after so many rollout batches: remove that of an earlier end of the run."""
    path = Path(folder) / FINAL
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    (Path(folder) / FINISHED).write_text(f"{batches}\n")


def _not_removable(folder: Path) -> Iterator[str]:
    """Before anything is removed: run.overwrite follows no link to a folder, and takes only what a run makes."""
    for name in (*RUN_FILES, *SAVED_FOLDERS):
        path, is_folder = folder / name, name in SAVED_FOLDERS
        if not os.path.lexists(path) or (path.is_dir() == is_folder and not (is_folder and path.is_symlink())):
            continue
        kind = "a symbolic link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"
        yield (
            f"{path} is {kind}, no {'folder' if is_folder else 'file'} that a run has made, and run.overwrite does not "
            "remove it; move it away, or give another run folder"
        )


def prepare(config: TrainConfig | SftConfig) -> IO[str]:
    """Make the run folder and write the resolved config into it; returns its lock, to be kept until the run ends.

    Under `run.overwrite` the records, the report and the saved weights of an earlier run are removed. Under
    `run.resume`, where there is no checkpoint to go on from, records are set aside.

    Raises:
        UserError: the folder holds another run, a run is under way in it, or it can't be written.
    """
    if messages := problems(config):
        raise UserError("\n".join(messages))
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        checkpoints.remove_partial(folder)  # what a killed run has left may fill the disk
        if not (config.run.resume and checkpoints.complete(folder)):
            if config.run.resume:
                _set_records_aside(folder)
            _clear(folder)
        pending = folder / f".{CONFIG_FILE}.partial"
        pending.write_text(dump_config(resolve(config)), encoding="utf-8")
        pending.rename(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"run.folder={folder} cannot be written: {error}") from None
    return lock


def _lock(folder: Path) -> IO[str]:
    """The folder's lock, which ends with this process. A file system without locks gives one that nobody respects."""
    lock = (folder / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"a run is under way in run.folder={folder} ({lock.read().strip() or 'of another process'}); wait for its "
            "end, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _set_records_aside(folder: Path) -> None:
    """Records of a run that was killed before its first checkpoint: it begins anew, without losing them."""
    for name in RECORDS:
        path = folder / name
        if path.is_file() and path.stat().st_size:
            number = 0
            while (other := folder / f"{name}.unused{number or ''}").exists():
                number += 1
            path.rename(other)
            print(
                f"{folder} has no checkpoint to go on from: the run begins anew; {name} is now {other.name}", flush=True
            )


def _clear(folder: Path) -> None:
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in SAVED_FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def release(config: TrainConfig | SftConfig) -> None:
    """Take back `prepare` after a run that failed before its first record: the folder is free again."""
    folder = Path(config.run.folder)
    if any((folder / name).exists() and (folder / name).stat().st_size for name in RECORDS):
        return
    if checkpoints.complete(folder):
        return
    for name in (CONFIG_FILE, LOCK, *RECORDS):
        (folder / name).unlink(missing_ok=True)
    if (folder / "tensorboard").is_dir() and not (folder / "tensorboard").is_symlink():
        shutil.rmtree(folder / "tensorboard")  # the failed run's own: it started without one
    with contextlib.suppress(OSError):  # it holds something else: leave it
        folder.rmdir()


def resolve(config: TrainConfig | SftConfig) -> TrainConfig | SftConfig:
    """The config with the algorithm's defaults written out: what the run really uses."""
    if isinstance(config, SftConfig):
        return config
    from gspo_megatron import algorithms

    return dataclasses.replace(config, algorithm=algorithms.resolve(config.algorithm))
