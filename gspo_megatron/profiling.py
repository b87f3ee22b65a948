"""Where the time of one rollout batch goes, as torch's profiler sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


@contextlib.contextmanager
def profiled(run_folder: str, name: str, rank: int, *, is_on: bool) -> Iterator[None]:
    """Write `profile/NAME.rank_R.txt`, a table of operations by their own time, and `.json`, a trace for Perfetto or
    chrome://tracing, of what runs inside."""
    if not is_on:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as recording:
        yield
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    sort_by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = recording.key_averages().table(sort_by=sort_by, row_limit=-1, max_name_column_width=80)
    (folder / f"{name}.rank_{rank}.txt").write_text(table)
    recording.export_chrome_trace(str(folder / f"{name}.rank_{rank}.json"))
