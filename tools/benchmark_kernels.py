#!/usr/bin/env python
"""The operations of gspo_megatron.ops beside what others use in their place: time, memory, and the machine's floor.

    .venv/bin/python tools/benchmark_kernels.py [--device cpu|cuda] [--cases token_logprobs,policy_loss]
        [--repetitions 7] [--threads 1] [--size token_logprobs=2048x32768] [--peers .venv-peers] [--output FILE]

    token_logprobs   log-probs and entropies from logits [T, V]
    linear_logprobs  the same, and GSPO's loss, from hidden states [T, H] and the output layer's weight [V, H]
    policy_loss      GSPO's loss and gradient from packed log-probs: S sequences, T tokens
    sparse_backward  linear_logprobs where the clip leaves 0, 15 and 50 % of the sequences without a gradient

Every candidate is checked against a definition in float64 before it is timed, one that is wrong is reported wrong.
Peers that cannot be imported are named and left out: `make setup-peers` installs those that run on a CPU; of a virtual
environment given by --peers only its packages are used, after this interpreter's own. Nobody else should use the
machine while this runs. Prints a report in Markdown; --output FILE writes FILE.json, FILE.md and FILE.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark.report import CaseResult, Report
from kernel_benchmark.worker import CASES, FAILED, OK, Request, Row, environment, work

from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR

ROOT = Path(__file__).parents[1]
DTYPE_NAMES = ["float32", "bfloat16"]
REPETITIONS = {"cpu": 5, "cuda": 20}


class Failed(Exception):
    """A measuring process ended; `key` is the candidate at work, None if there was none yet."""

    def __init__(self, key: str | None, exit_code: int, stderr: str) -> None:
        super().__init__(f"{key or 'before the first candidate'}: exit code {exit_code}\n{stderr}")
        self.key, self.exit_code, self.stderr = key, exit_code, stderr

    @property
    def reason(self) -> str:
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return f"exit code {self.exit_code}, {lines[-1].strip()[:200]}" if lines else f"exit code {self.exit_code}"


def ask(request: Request) -> Any:
    """Run a measuring process. Raises Failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "request.json"
        request = replace(request, answer=str(folder / "answer.json"), progress=str(folder / "progress"))
        request.write(path)
        command = [sys.executable, __file__, "--work", str(path)]
        done = subprocess.run(command, env=environment(request), stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == EXIT_USER_ERROR:
            raise UserError(done.stderr.strip().removeprefix("error: "))
        if done.returncode != EXIT_DONE:
            progress = Path(request.progress)
            raise Failed(progress.read_text("utf-8") if progress.exists() else None, done.returncode, done.stderr)
        return json.loads(Path(request.answer).read_text("utf-8"))


def measure_times(request: Request) -> tuple[Any, list[Row]]:
    """The answer for all candidates of a case, and the rows of peers that brought the process down."""
    ours = {candidate.key: candidate.ours for candidate in CASES[request.case].candidates}
    failed: list[Row] = []
    while True:
        try:
            return ask(request), failed
        except Failed as failure:
            if failure.key is None or ours[failure.key]:
                raise
            objective, name = failure.key.split(": ", 1)
            failed.append(Row(name, objective, False, FAILED, failure.reason))
            request = replace(request, left_out=[*request.left_out, failure.key])


def measure_memory(request: Request, row: Row, result_bytes: int) -> None:
    """Fill in the row's memory, from a process of its own."""
    try:
        row.peak_bytes = ask(replace(request, candidate=row.key))["peak_bytes"]
    except Failed as failure:
        if row.ours:
            raise
        row.note = f"memory: {failure.reason}"
        return
    if row.peak_bytes is not None:
        row.extra_bytes = max(0, row.peak_bytes - result_bytes)


def measure_case(name: str, options: argparse.Namespace) -> tuple[CaseResult, dict[str, str]]:
    case = CASES[name]
    default_sizes = case.default_sizes[options.device]
    request = Request(
        case=name,
        sizes=list(options.size.get(name, default_sizes)),
        device=options.device,
        dtype=options.dtype if options.dtype and case.has_dtype else case.dtypes[options.device],
        threads=options.threads,
        repetitions=options.repetitions,
        answer="",
        progress="",
        peers=options.peers,
    )
    print(f"{name}: times", file=sys.stderr, flush=True)
    answer, failed = measure_times(request)
    rows = [Row(**row) for row in answer["rows"]]
    print(f"{name}: memory", file=sys.stderr, flush=True)
    # On a CPU a process's memory is its own whatever runs beside it; a GPU's memory must hold one at a time.
    at_once = max(1, (os.cpu_count() or 1) // request.threads) if options.device == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        timed = [row for row in rows if row.status == OK]
        list(pool.map(lambda row: measure_memory(request, row, answer["result_bytes"]), timed))
    order = [candidate.key for candidate in case.candidates]
    result = CaseResult(
        name=name,
        title=case.title,
        letters=case.letters,
        sizes=request.sizes,
        default_sizes=list(default_sizes),
        dtype=request.dtype,
        floor=case.floor,
        probe_bytes=answer["probe_bytes"],
        rates=answer["rates"],
        floors_s=answer["floors_s"],
        rows=sorted(rows + failed, key=lambda row: order.index(row.key)),
    )
    return result, answer["machine"]


def parse_size(text: str) -> tuple[str, tuple[int, ...]]:
    """'policy_loss=512x262144' -> the case and its sizes."""
    name, _, sizes = text.partition("=")
    if name not in CASES:
        raise UserError(f"--size {text}: {name!r} is none of {', '.join(CASES)}")
    letters = CASES[name].letters
    parts = sizes.split("x")
    if len(parts) != len(letters.split("x")) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"--size {text}: the sizes of {name} are {letters}, positive numbers, as in {name}="
            + "x".join(str(size) for size in CASES[name].default_sizes["cpu"])
        )
    return name, tuple(int(part) for part in parts)


def find_peers(folder: Path | None) -> str | None:
    """Packages of the virtual environment that --peers names; by default of .venv-peers, if it is there."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = (folder or ROOT / ".venv-peers") / "lib" / version / "site-packages"
    if packages.is_dir():
        return str(packages)
    if folder is not None:
        raise UserError(
            f"--peers {folder} has no {packages.relative_to(folder)}; name a virtual environment of {version}"
        )
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default: cuda where it is there")
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas; default: all")
    parser.add_argument("--repetitions", type=int, help="default: 5 on a CPU, 20 on CUDA")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: %(default)s")
    parser.add_argument(
        "--size", action="append", default=[], metavar="CASE=AxB", help="other sizes than the device's default"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of logits; default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--peers", type=Path, help="a virtual environment with peers; default: .venv-peers, if there")
    parser.add_argument("--output", type=Path, help="write FILE.json, FILE.md and FILE.png")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # how this program starts its measuring processes
    options = parser.parse_args()
    if options.repetitions is None:
        options.repetitions = REPETITIONS[options.device]
    for name in ("repetitions", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    options.cases = options.cases.split(",")
    for name in options.cases:
        if name not in CASES:
            raise UserError(f"--cases {name!r} is none of {', '.join(CASES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu")
    options.size = dict(parse_size(text) for text in options.size)
    options.peers = find_peers(options.peers)
    return options


def main() -> int:
    options = parse_arguments()
    if options.work is not None:
        work(options.work)
        return EXIT_DONE
    results = [measure_case(name, options) for name in options.cases]
    report = Report(
        date=datetime.date.today().isoformat(),
        device=options.device,
        repetitions=options.repetitions,
        machine=results[0][1],
        cases=[result for result, _ in results],
    )
    text = report.as_markdown()
    print(text)
    if options.output is not None:
        from kernel_benchmark.plot import draw

        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
        Path(f"{options.output}.json").write_text(content, encoding="utf-8")
        Path(f"{options.output}.md").write_text(text, encoding="utf-8")
        draw(report, Path(f"{options.output}.png"))
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
