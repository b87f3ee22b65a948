"""The benchmarks as they are called, at their smallest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
