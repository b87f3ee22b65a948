"""Time, memory and rates on this machine."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gspo_megatron.ops.native.extension import load
from kernel_benchmark.case import Problem, Rates

PEERS = ("megatron-core", "trl", "liger-kernel", "verl", "cut-cross-entropy", "triton")
PROBE_COLUMNS = 8192  # of the matrix products that the rate is measured with: a chunk of the vocabulary
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Stopwatch:
    """Marks on the device's own time line. Nothing is waited for between them."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if self._on_cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next. Waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class Probes:
    """What the machine itself can do: measured in turn with the candidates, in the same process."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._bytes = problem.probe_bytes
        source = torch.ones(problem.probe_bytes // dtype.itemsize, device=device, dtype=dtype)
        target = torch.empty_like(source)
        self._steps: dict[str, Callable[[], object]] = {
            "read": source.amax,
            "copy": lambda: target.copy_(source),
            "update": lambda: target.mul_(1.0),
        }
        self._flops = 0
        if problem.product is not None:
            rows, width, columns = problem.product
            columns = min(columns, PROBE_COLUMNS)
            hidden = torch.randn(rows, width, device=device).to(dtype)
            weight = torch.randn(columns, width, device=device).to(dtype)
            logits = torch.randn(rows, columns, device=device).to(dtype)
            outputs = torch.empty_like(logits), torch.empty_like(hidden), torch.empty_like(weight)
            self._flops = 3 * 2 * rows * width * columns

            def multiply() -> None:
                torch.mm(hidden, weight.t(), out=outputs[0])
                torch.mm(logits, weight, out=outputs[1])
                torch.mm(logits.t(), hidden, out=outputs[2])

            self._steps["multiply"] = multiply
        self._times: dict[str, list[float]] = {name: [] for name in self._steps}
        for step in self._steps.values():
            step()

    def measure(self) -> None:
        """Each of them once more."""
        for name, step in self._steps.items():
            watch = Stopwatch(self._device)
            watch.mark()
            step()
            watch.mark()
            self._times[name] += watch.seconds()

    def rates(self) -> Rates:
        seconds = {name: statistics.median(times) for name, times in self._times.items()}
        return Rates(
            read=self._bytes / seconds["read"],
            copy=2 * self._bytes / seconds["copy"],
            update=2 * self._bytes / seconds["update"],
            multiply=self._flops / seconds["multiply"] if self._flops else None,
        )


class PeakMemory:
    """Bytes that a piece of work takes at most, over the state before it. Use in a process of its own.

    On a CPU that is resident memory, which the kernel can be asked to count anew; None where it cannot.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        gc.collect()
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            self._counted = True
            return
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the work
        self._counted = os.access(CLEAR_REFS, os.W_OK) and STATUS.exists()
        if self._counted:
            CLEAR_REFS.write_text("5")  # the peak counts from here
            self._before = _resident("VmRSS")

    def extra_bytes(self) -> int | None:
        if not self._counted:
            return None
        if self._on_cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None, f"{STATUS} has no {field}"
    return int(match[1]) * 1024


def describe_machine(device: torch.device) -> dict[str, str]:
    """In words: the processor or GPU, threads, versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        cpu = match[1].strip()
    machine = {
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "kernels run with": load().instruction_set(),
        "torch": torch.__version__,
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
    installed = {name: version for name in PEERS if (version := _installed_version(name)) is not None}
    machine["peers"] = ", ".join(f"{name} {version}" for name, version in installed.items()) or "none installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        machine["cuda"] = str(torch.version.cuda)
    return machine


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
