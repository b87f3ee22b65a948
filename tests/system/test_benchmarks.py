"""The benchmarks as they are called, at their smallest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system.sglang_setup import sglang_python

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


def test_training_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_training.py"), "--size", "tiny", "--steps", "1"]
    command += ["--variants", "moe", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert output.read_text() in result.stdout
    [row] = [line for line in output.read_text().splitlines() if line.startswith("| moe |")]
    assert float(row.split("|")[3]) > 0
    assert float(row.split("|")[-2]) <= 1e-6, "the same weights give the same log-probabilities"
    assert "experts: grouped products in 2 layers" in output.read_text()


def test_the_benchmark_holds_a_layout_to_the_formula(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_layouts.py"), "--layouts", "DP2xEP2", "--steps", "1"]
    done = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in out.read_text().splitlines() if line.startswith("| DP2xEP2")]
    assert len(rows) == 2
    assert float(rows[0][6]) == pytest.approx(float(rows[0][7]), rel=0.05)
    assert float(rows[0][6]) > 1


@pytest.mark.slow
def test_the_loss_head_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_loss_head.py"), "--batches", "1", "--vocabularies", "100"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in output.read_text().splitlines() if line.startswith("| 100 |")]
    assert [row[2].strip() for row in rows] == ["reference", "native"]
    assert all(float(row[5]) > 0 and 0 < float(row[6].strip(" %")) < 60 for row in rows)
    assert float(rows[1][7]) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_updates_are_measured_beside_a_plain_broadcast(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_reshard.py"), "measured", "--size", "tiny"]
    command += ["--layouts", "TP2", "--transports", "direct,distributed", "--servers", "1", "--repetitions", "1"]
    command += ["--python", str(sglang_python()), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert output.read_text() in done.stdout
    lines = [[cell.strip() for cell in line.split("|")] for line in output.read_text().splitlines()]
    direct, served = [line for line in lines if line[1:2] == ["TP2"]]
    assert int(direct[2]) == 2 and int(direct[3]) >= 2
    assert float(direct[8].strip("*")) > 0
    assert 1 < float(direct[14]) < 2, "every byte of the model is written once, and what was gathered once more"
    assert 0 < float(direct[15]) < 1
    assert served[2] == "distributed, TP1"
    [probe] = [line for line in lines if line[1:2] == ["probe, whole"]]
    assert float(probe[3]) > 0


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_rollouts_from_a_server_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_rollout.py"), "--repetitions", "1", "--responses", "64"]
    command += ["--python", str(sglang_python()), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in output.read_text().splitlines() if " a request" in line and line[0] == "|"]
    assert len(rows) == 3
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)


def kernel_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/benchmark_kernels.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def environment_with(folder: Path, package: str, source: str) -> Path:
    """A virtual environment's folders with one package."""
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / package).mkdir(parents=True)
    (packages / package / "__init__.py").write_text(source)
    return folder


def test_kernels_are_measured_and_a_peer_that_ends_the_process_is_left_out(tmp_path: Path) -> None:
    peers = environment_with(tmp_path / "peers", "trl", "import os, sys\nsys.stderr.write('went down')\nos._exit(7)\n")
    output = tmp_path / "kernels"
    sizes = ["--size", "linear_logprobs=64x16x300", "--size", "policy_loss=8x512"]
    cases = ["--cases", "linear_logprobs,policy_loss", "--repetitions", "2"]
    done = kernel_benchmark(*cases, *sizes, "--peers", str(peers), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".md").read_text() in done.stdout
    assert output.with_suffix(".png").stat().st_size > 10_000
    report = json.loads(output.with_suffix(".json").read_text())
    statuses: dict[str, list[str]] = {}
    for case in report["cases"]:
        for row in case["rows"]:
            statuses.setdefault(row["status"], []).append(row["name"])
            if row["status"] == "ok":
                assert len(row["forward_s"]) == len(row["backward_s"]) == 2
                assert row["extra_bytes"] is not None
    assert statuses["failed"] == ["TRL ChunkedLogProbFunction"] * 2
    assert all("Liger" in name for name in statuses["not installed"])
    assert set(statuses) == {"ok", "failed", "not installed"}
    assert "exit code 7, went down" in done.stdout
    assert len([figure for figure in report["figures"] if figure["met"] is not None]) == 7


@pytest.mark.parametrize("case", [pytest.param("token_logprobs", marks=pytest.mark.slow), "sparse_backward"])
def test_candidates_agree_with_the_definition(case: str, tmp_path: Path) -> None:
    size = {"token_logprobs": "48x300", "sparse_backward": "256x16x300"}[case]
    output = tmp_path / "kernels"
    arguments = ["--cases", case, "--size", f"{case}={size}", "--repetitions", "1", "--output", str(output)]
    done = kernel_benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.with_suffix(".json").read_text())["cases"][0]["rows"]
    wrong = [row["name"] for row in rows if row["status"] not in ("ok", "not installed")]
    # Megatron's rounds its gradient to bfloat16 also for float32 logits.
    assert set(wrong) <= {"Megatron fused_vocab_parallel_cross_entropy"}
    assert all(row["status"] == "ok" for row in rows if row["ours"])


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_a_wrong_candidate_is_reported_and_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from kernel_benchmark import policy_loss, worker
    from kernel_benchmark.case import Candidate, Prepared

    def prepare(problem: Any) -> Prepared:
        right = policy_loss.padded(problem)

        def forward() -> tuple[torch.Tensor, ...]:
            (loss,) = right.forward()
            return (loss + 1e-3,) if what == "value" else (1.001 * loss - 0.001 * loss.detach(),)

        return dataclasses.replace(right, forward=forward)

    candidates = (*policy_loss.CASE.candidates[-1:], Candidate("wrong", policy_loss.LOSS, prepare))
    monkeypatch.setitem(worker.CASES, "policy_loss", dataclasses.replace(policy_loss.CASE, candidates=candidates))
    request = worker.Request("policy_loss", [8, 512], "cpu", "float32", 1, 2, answer="", progress="/dev/null")
    right, wrong = worker.Worker(request).times()["rows"]
    assert (right["status"], len(right["forward_s"])) == ("ok", 2)
    assert (wrong["status"], len(wrong["forward_s"])) == ("wrong", 0)
    assert wrong["note"].startswith("output loss" if what == "value" else "gradient log-probs")


def test_sizes_are_refused_with_the_letters_they_need() -> None:
    done = kernel_benchmark("--size", "linear_logprobs=64x300")
    assert done.returncode == 2
    assert "TxHxV" in done.stderr


@pytest.mark.slow
def test_saving_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tools/benchmark_checkpoint.py"), "--repetitions", "1", "--experts", "2"]
    command += ["--folder", str(tmp_path), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    shares = [float(line.split("|")[2].strip(" %")) for line in output.read_text().splitlines() if "% |" in line]
    assert len(shares) == 5 and shares[1] == 100
    assert 0 < shares[2] < 60 and list(tmp_path.iterdir()) == [output]
