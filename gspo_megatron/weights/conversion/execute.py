"""Carrying out a conversion: files in parallel, each hashed while it is written, resumable, atomic.

Everything is written into `.NAME.partial` beside the target. A manifest there says which files are finished, with
their checksums; a conversion that was killed takes up those that still have them. When all are there, the folder gets
its name by one rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from gspo_megatron.errors import UserError
from gspo_megatron.weights.conversion.target import check_target
from gspo_megatron.weights.torch_dist.checksums import FileSum, hash_file

MANIFEST = ".manifest.jsonl"  # hidden: no file of a model has the name
_BLOCK_BYTES = 4 * 2**20
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # no fault of the name
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@dataclass(frozen=True)
class OutputFile:
    """A large file of the result."""

    name: str
    nbytes: int


class Conversion(Protocol):
    """A plan: what is written, before anything is."""

    source: Path

    @property
    def files(self) -> Sequence[OutputFile]: ...

    @property
    def identity(self) -> str:
        """Differs where the bytes of the files may differ."""
        ...

    def content(self, number: int) -> Iterator[memoryview | bytes]:
        """The bytes of a file, in order. Called from several threads, each for other files."""
        ...

    def finish(self, folder: Path, sums: Mapping[str, FileSum]) -> None:
        """Write the small files that make the large ones a model. `sums`: of the large ones."""
        ...


class Report(Protocol):
    """Who is told how far it is."""

    def advance(self, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...


def partial_folder(target: Path) -> Path:
    """Where the result is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


def execute(conversion: Conversion, target: Path, *, overwrite: bool = False, threads: int = 2, report: Report) -> None:
    """Write the whole result. Raises UserError where the target is taken, the source damaged or the disk too small.

    What was finished stays for the next call if this one fails or is killed.
    """
    check_target(target, conversion.source, overwrite=overwrite)
    partial = partial_folder(target)
    _make(partial)
    with _locked(partial):
        manifest = _Manifest(partial, conversion.identity)
        done = _still_good(partial, manifest.read(), conversion.files, threads, report)
        manifest.restart(done)
        rest = [i for i, file in enumerate(conversion.files) if file.name not in done]
        _check_space(partial, sum(conversion.files[i].nbytes for i in rest))
        _run(lambda i: _write(conversion, i, partial, manifest, report), rest, threads)
        sums = manifest.read()
        conversion.finish(partial, sums)
        _sync_small_files(partial, sums)
        manifest.path.unlink()  # not before: a kill in the lines above costs them alone
        _sync(partial)
        check_target(target, conversion.source, overwrite=overwrite)  # again: it took a while
        _replace(partial, target)


def _make(partial: Path) -> None:
    try:
        if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
            raise UserError(f"{partial}, where the result would be written, is no folder; remove it")
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        raise UserError(f"{partial} can't be made: {error.strerror}; choose another place for the result") from None


def _run(work: Callable[[int], None], numbers: Iterable[int], threads: int) -> None:
    """All in parallel; the first error, and an interrupt, stop those that have not begun, and are raised."""
    stop = threading.Event()

    def guarded(number: int) -> None:
        if stop.is_set():
            return
        try:
            work(number)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(guarded, number) for number in numbers]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()


def _write(conversion: Conversion, number: int, partial: Path, manifest: _Manifest, report: Report) -> None:
    file = conversion.files[number]
    digest, size = xxhash.xxh3_128(), 0
    with open(partial / file.name, "wb", buffering=0) as stream:
        for buffer in conversion.content(number):
            view = memoryview(buffer)
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                digest.update(block)
                written = 0
                while written < len(block):
                    written += stream.write(block[written:])
                report.advance(len(block))
            size += len(view)
        os.fsync(stream.fileno())
    assert size == file.nbytes, f"{file.name} has {size} bytes, was planned with {file.nbytes}"
    manifest.add(file.name, FileSum(size, digest.hexdigest()))


class _Manifest:
    """The files that are finished, one line each behind a line that says of which conversion."""

    def __init__(self, partial: Path, identity: str) -> None:
        self.path, self.identity = partial / MANIFEST, identity
        self._lock = threading.Lock()

    def read(self) -> dict[str, FileSum]:
        """By name; nothing of another conversion, and not a line that was being written when it was killed."""
        found: dict[str, FileSum] = {}
        with contextlib.suppress(FileNotFoundError):
            lines = self.path.read_text(errors="replace").splitlines()
            if not lines or lines[0] != self._first_line():
                return {}
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                    found[entry["file"]] = FileSum(entry["size"], entry["xxh3_128"])
                except (ValueError, KeyError, TypeError):
                    break
        return found

    def _first_line(self) -> str:
        return json.dumps({"conversion": self.identity})

    def restart(self, done: dict[str, FileSum]) -> None:
        """Begin anew with what is known to be good, and remove everything else."""
        for path in self.path.parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in done and path != self.path:
                path.unlink()
        other = self.path.with_name(MANIFEST + ".new")
        other.write_text("".join(f"{line}\n" for line in [self._first_line(), *map(_line, done.items())]))
        other.rename(self.path)

    def add(self, name: str, entry: FileSum) -> None:
        with self._lock, open(self.path, "a") as file:
            file.write(_line((name, entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _line(item: tuple[str, FileSum]) -> str:
    return json.dumps({"file": item[0], "size": item[1].size, "xxh3_128": item[1].xxh3_128})


def _still_good(
    partial: Path, manifest: dict[str, FileSum], files: Sequence[OutputFile], threads: int, report: Report
) -> dict[str, FileSum]:
    """Files of an earlier try that have their checksums."""
    wanted = {file.name: file.nbytes for file in files}
    there = [
        name
        for name, entry in manifest.items()
        if wanted.get(name) == entry.size
        and (partial / name).is_file()
        and not (partial / name).is_symlink()
        and (partial / name).stat().st_size == entry.size
    ]
    with ThreadPoolExecutor(threads) as pool:
        sums = dict(zip(there, pool.map(lambda name: hash_file(partial / name), there), strict=True))
    done = {name: entry for name, entry in sums.items() if entry == manifest[name]}
    if done:
        nbytes = sum(entry.size for entry in done.values())
        report.note(f"{len(done)} of {len(files)} files are there from an earlier try, {nbytes / 1e9:.2f} GB")
        report.advance(nbytes)
    return done


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB free, the rest takes {needed / 1e9:.1f} GB")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One conversion at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(f"{folder} is being written by another conversion; wait for it or end it") from None
        yield
    finally:
        os.close(handle)


def _sync_small_files(folder: Path, synced: Iterable[str]) -> None:
    """Everything that was not synced when it was written, and the folders themselves."""
    known = set(synced)
    for path in folder.rglob("*"):
        if path.is_dir() or path.relative_to(folder).as_posix() not in known:
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(partial: Path, target: Path) -> None:
    """Give the folder its name. What had it before is removed afterwards."""
    if target.exists():
        _exchange(partial, target)
        _sync(target.parent)
        shutil.rmtree(partial)
    else:
        partial.rename(target)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names at once, so that at no time there is nothing under them."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(other))
    # A file system that can't: the old folder is under another name for a moment, and never removed before.
    aside = other.with_name(f".{other.name}.replaced")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
