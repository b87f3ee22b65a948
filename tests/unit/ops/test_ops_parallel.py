"""Vocabulary-parallel and context-parallel operations over gloo processes, started once for all cases."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gloo_cases.py")
TIMEOUT_S = 90


def case_names() -> list[str]:
    """Names in the script's CASES, read without importing it."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "CASES":
            assert isinstance(node.value, ast.List)
            return [ast.unparse(element) for element in node.value.elts]
    raise AssertionError("gloo_cases.py has no CASES")


@pytest.fixture(scope="module", params=[(2, "native"), (4, "native"), (2, "reference")], ids=str)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    world, implementation = request.param
    folder = tmp_path_factory.mktemp("gloo")
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder / "store"), str(folder / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), implementation, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output}"
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("case", case_names())
def test_ranks_equal_one_rank(case: str, results: list[dict[str, str | None]]) -> None:
    for rank, result in enumerate(results):
        error = result[case]
        assert error is None, f"rank {rank}:\n{error}"
