"""What a reader needs to know of where a benchmark ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "reasoning_gym")


def facts(root: Path) -> dict[str, str]:
    """Date, commit, processor, GPUs, versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "reported": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(root),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "GPUs": _gpus(),
        "versions": f"Python {platform.python_version()}, {versions}",
    }


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
