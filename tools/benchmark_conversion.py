#!/usr/bin/env python
"""How fast a made MoE checkpoint is converted both ways, beside a plain copy of its bytes, and in how much memory.

    python tools/benchmark_conversion.py [--gigabytes 3] [--repeats 3] [--folder DIR] [--output FILE]

Copy, import and export take turns on one disk; each ends in fsync of all it wrote. Every conversion runs in a process
of its own, which reports its seconds without imports, and the most of anonymous and shared memory that it held. Prints
a table in markdown; without --gigabytes it also writes it to benchmarks/results/conversion_cpu.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gspo_megatron.weights.families import find_family
from gspo_megatron.weights.safetensors_header import format_header

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "conversion_cpu.md"
GIGABYTES = 3.0
LEAST_RATIO, MOST_BYTES = 0.4, 1.3e9  # what is promised of the ratio to a copy, and of memory
_EXPERTS, _HIDDEN, _FFN, _VOCABULARY = 64, 1024, 512, 32_000
_SAMPLE_S = 0.005


@dataclass(frozen=True)
class Measured:
    """One conversion."""

    seconds: float
    copy_seconds: float  # of a copy of the same bytes just before it
    peak_bytes: int  # anonymous and shared memory

    @property
    def ratio(self) -> float:
        return self.copy_seconds / self.seconds


def make_model(folder: Path, gigabytes: float, *, shard_bytes: float = 1e9) -> Path:
    """A Qwen3-MoE of random bfloat16 weights of about that size, in files as transformers writes them."""
    layer_bytes = 2 * (3 * _EXPERTS * _HIDDEN * _FFN + 3 * _HIDDEN * _HIDDEN)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * _VOCABULARY * _HIDDEN) / layer_bytes)),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": _FFN,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    family = find_family(config)
    specs = family.specs(family.fields(config))
    files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in ((n, s) for spec in specs for n, s in zip(spec.hf, spec.hf_shapes, strict=True)):
        nbytes = 2 * math.prod(shape)
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append((name, torch.bfloat16, shape))
        size += nbytes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for i, tensors in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors.sort()
        with open(folder / file, "wb") as stream:
            stream.write(format_header(tensors, {"format": "pt"})[0])
            for name, _, shape in tensors:
                values = torch.randint(-(2**14), 2**14, shape, generator=generator, dtype=torch.int16)
                stream.write(memoryview(values.numpy()).cast("B"))
                weight_map[name] = file
    index = {"metadata": {"total_size": sum(p.stat().st_size for p in folder.iterdir())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy that ends in fsync."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in (p for p in target.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def convert(direction: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a conversion in a process of its own."""
    command = [sys.executable, __file__, "--child", direction, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    return found["seconds"], found["peak_bytes"]


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, list[Measured]]:
    """By direction. What was written is removed after each, the model at the end."""
    model = make_model(folder / "model", gigabytes)
    found: dict[str, list[Measured]] = {"import": [], "export": []}
    try:
        for _ in range(repeats):
            for direction, source, target in (("import", "model", "dist"), ("export", "dist", "back")):
                copy_seconds = copy(folder / source, folder / "copy")
                shutil.rmtree(folder / "copy")
                seconds, peak = convert(direction, folder / source, folder / target)
                found[direction].append(Measured(seconds, copy_seconds, peak))
            assert all((folder / "back" / p.name).read_bytes() == p.read_bytes() for p in model.iterdir()), (
                "the round trip is not bitwise"
            )
            shutil.rmtree(folder / "dist")
            shutil.rmtree(folder / "back")
    finally:
        shutil.rmtree(folder)
    return found


def _child(direction: str, source: Path, target: Path) -> None:
    """One conversion; prints what it took."""
    from gspo_megatron.weights.conversion.execute import execute
    from gspo_megatron.weights.conversion.models import open_model
    from gspo_megatron.weights.conversion.progress import ByteProgress
    from gspo_megatron.weights.conversion.to_hf import ToHF
    from gspo_megatron.weights.conversion.to_megatron import ToMegatron

    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _held_bytes())
            time.sleep(_SAMPLE_S)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    model = open_model(source)
    conversion = (ToMegatron if direction == "import" else ToHF)(model)  # type: ignore[arg-type]
    threads = max(1, min(8, len(os.sched_getaffinity(0))))
    with ByteProgress(sum(f.nbytes for f in conversion.files), direction) as progress:
        execute(conversion, target, threads=threads, report=progress)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak[0]}))


def _held_bytes() -> int:
    """Anonymous and shared memory of this process; mapped files are the page cache's."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return sum(1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def table(found: dict[str, list[Measured]], gigabytes: float) -> str:
    """In markdown."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"Conversion of a made MoE of {gigabytes:g} GB in bfloat16 ({_EXPERTS} experts a layer) on {cores} cores, "
        f"torch {torch.__version__}: medians of {len(found['import'])}, each beside a plain copy of the same bytes "
        "just before it; both end in fsync, imports are left out.",
        "",
        f"Promised: at least {LEAST_RATIO:g} of the copy's speed, at most {MOST_BYTES / 1e9:g} GB of memory "
        "(anonymous and shared).",
        "",
        "| direction | copy, MB/s | conversion, MB/s | ratio to the copy | least ratio | most memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for direction, runs in found.items():
        size = gigabytes * 1e3
        figures = (
            f"{statistics.median(size / r.copy_seconds for r in runs):.0f}",
            f"{statistics.median(size / r.seconds for r in runs):.0f}",
            f"{statistics.median(r.ratio for r in runs):.2f}",
            f"{min(r.ratio for r in runs):.2f}",
            f"{max(r.peak_bytes for r in runs) / 1e9:.2f}",
        )
        lines.append(f"| {direction} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, help=f"of the model (default {GIGABYTES:g})")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; needs four times the model's size")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        direction, source, target = options.child
        _child(direction, Path(source), Path(target))
        return
    gigabytes = options.gigabytes or GIGABYTES
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = table(measure(Path(folder) / "conversion", gigabytes, options.repeats), gigabytes)
    print(text, end="")
    output = options.output or (None if options.gigabytes else OUTPUT)
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
