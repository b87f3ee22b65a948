"""The run folder: what a run may write into, made before the ranks start and given back if nothing came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.config_io import dump_config
from gspo_megatron.errors import UserError

CONFIG_FILE = "config.toml"
RECORDS = ("metrics.jsonl", "samples.jsonl")
SAVED_FOLDERS = ("final", "tensorboard", "profile")
RUN_FILES = (CONFIG_FILE, *RECORDS, "report.html", "report.png")


def problems(config: TrainConfig | SftConfig) -> list[str]:
    """What speaks against this run folder: it holds another run, or something a run has not made."""
    folder = Path(config.run.folder)
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
    if not config.run.overwrite:
        if not found:
            return []
        return [
            f"run.folder={folder} already holds a run ({', '.join(found)}); give another folder, "
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


def prepare(config: TrainConfig | SftConfig) -> Path:
    """Make the run folder and write the resolved config into it; returns its path.

    Under `run.overwrite` the records, the report and the saved weights of an earlier run are removed.

    Raises:
        UserError: the folder holds another run, or can't be written.
    """
    if messages := problems(config):
        raise UserError("\n".join(messages))
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for name in SAVED_FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
        (folder / CONFIG_FILE).write_text(dump_config(resolve(config)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.folder={folder} cannot be written: {error}") from None
    return folder


def release(config: TrainConfig | SftConfig) -> None:
    """Take back `prepare` after a run that failed before its first record: the folder is free again."""
    folder = Path(config.run.folder)
    if any((folder / name).exists() and (folder / name).stat().st_size for name in RECORDS):
        return
    for name in (CONFIG_FILE, *RECORDS):
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
