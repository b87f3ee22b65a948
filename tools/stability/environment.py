"""What a reader needs to know of where a benchmark ran."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from gspo_megatron.stability.benchmark.results import write_atomically

FOLDER = "environments"  # in a benchmark's folder, one file for each that cells ran in
PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "reasoning_gym")


def facts(root: Path) -> dict[str, str]:
    """Commit, processor, GPUs, versions of this checkout and machine."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "commit": _commit(root),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "GPUs": _gpus(),
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def record(folder: Path, root: Path) -> None:
    """Write down in the benchmark's folder that cells run here: a report may be made later, and elsewhere."""
    here = facts(root)
    name = hashlib.sha256(json.dumps(here).encode()).hexdigest()[:12]
    write_atomically(folder / FOLDER / f"{name}.json", here)


def of_report(folder: Path, root: Path) -> dict[str, str]:
    """When the report was made, and the environments that cells ran in; where none was recorded, the report's own."""
    ran = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / FOLDER).glob("*.json"))]
    made = {"reported": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if not ran:
        return made | {f"{key} of the report, runs recorded none": value for key, value in facts(root).items()}
    numbers = [""] if len(ran) == 1 else [f" ({i} of {len(ran)} environments)" for i in range(1, len(ran) + 1)]
    return made | {f"{key}{n}": value for n, one in zip(numbers, ran, strict=True) for key, value in one.items()}


def _run(*words: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _commit(root: Path) -> str:
    commit = _run("git", "rev-parse", "--short", "HEAD", cwd=root) or "unknown"
    return commit + (" with changes" if _run("git", "status", "--porcelain", "--untracked-files=no", cwd=root) else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> str:
    names = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"
