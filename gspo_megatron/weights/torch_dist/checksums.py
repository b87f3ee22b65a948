"""Size and xxh3-128 of every file of a checkpoint folder: checksums.json."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import xxhash

from gspo_megatron.errors import UserError

CHECKSUMS = "checksums.json"
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileSum:
    """Of one file."""

    size: int  # bytes
    xxh3_128: str  # 32 hexadecimal digits


def hash_file(path: Path) -> FileSum:
    """Of a file, read in blocks."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileSum(size, digest.hexdigest())


def list_files(folder: Path) -> list[str]:
    """Files of the folder and below, but for checksums.json itself: relative, with /, sorted."""
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if name != CHECKSUMS)


def hash_files(folder: Path, names: Iterable[str], *, threads: int = 2) -> dict[str, FileSum]:
    """Of several files of a folder."""
    names = list(names)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


def write_checksums(
    folder: Path, known: Mapping[str, FileSum] | None = None, *, skip: Container[str] = (), threads: int = 2
) -> None:
    """Write and fsync checksums.json over all files of the folder.

    `known`: files that were hashed already, while they were written, say; only the others are read. `skip`: files that
    won't stay.
    """
    names, sums = [name for name in list_files(folder) if name not in skip], dict(known or {})
    assert sums.keys() <= set(names), f"hashed, but not there: {sorted(sums.keys() - set(names))}"
    sums |= hash_files(folder, (name for name in names if name not in sums), threads=threads)
    content = {name: asdict(sums[name]) for name in names}
    with open(folder / CHECKSUMS, "w") as file:
        file.write(json.dumps({"files": content}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_checksums(folder: Path) -> dict[str, FileSum]:
    """By file. Raises UserError, naming the file, where it is missing or damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing proves that the files of {folder} are whole")
    try:
        sums = {name: FileSum(**entry) for name, entry in json.loads(path.read_bytes())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no checksums: {type(error).__name__}: {error}") from None
    for name, entry in sums.items():
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
            raise UserError(f"{path} names {name!r}, which is not a file of {folder}")
        if type(entry.size) is not int or not isinstance(entry.xxh3_128, str):
            raise UserError(f"{path} holds no checksum of {name}: {entry.size!r}, {entry.xxh3_128!r}")
    return sums


def find_damage(folder: Path, *, sizes_only: bool = False, threads: int = 2) -> list[str]:
    """What is wrong with the files of the folder, one line each that names the file; [] if nothing is.

    Files that checksums.json does not know count as damage too. `sizes_only`: reads no file, and finds only those
    that are missing, cut off or too many. Raises UserError where checksums.json itself can't be read.
    """
    expected, found = read_checksums(folder), set(list_files(folder))
    damage = [f"{folder / name} is missing" for name in sorted(expected.keys() - found)]
    damage += [f"{folder / name} is not in {CHECKSUMS}" for name in sorted(found - expected.keys())]
    whole = []
    for name in sorted(found & expected.keys()):
        size = (folder / name).stat().st_size
        if size != expected[name].size:
            damage.append(f"{folder / name} has {size} bytes, should have {expected[name].size}")
        else:
            whole.append(name)
    if not sizes_only:
        for name, entry in hash_files(folder, whole, threads=threads).items():
            if entry.xxh3_128 != expected[name].xxh3_128:
                damage.append(f"{folder / name} is damaged: xxh3-128 {entry.xxh3_128}, not {expected[name].xxh3_128}")
    return damage
