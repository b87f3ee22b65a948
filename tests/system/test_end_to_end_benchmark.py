"""tools/benchmark_end_to_end.py at its smallest.

Continuous integration sets up no .venv-peers, so our side alone runs there: the case "ours". Where .venv-peers exists
(`make setup-peers`), the case "ours,trl" runs both sides in turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark_end_to_end.py"
SIDES = ["ours", *(["ours,trl"] if (ROOT / ".venv-peers/bin/python").is_file() else [])]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--size", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("sides", SIDES)
def test_the_sides_do_the_job(tmp_path: Path, sides: str) -> None:
    output = tmp_path / "new/result"
    done = run("--sides", sides, "--lengths", "8", "--processes", "1,2", "--batches", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".md").read_text() in done.stdout
    report = json.loads(output.with_suffix(".json").read_text())
    names = sides.split(",")
    assert [(m["side"], m["processes"]) for m in report["measurements"]] == [(n, p) for p in (1, 2) for n in names]
    for m in report["measurements"]:
        check_measurement(m)
    assert ("nothing is compared" in done.stdout) == (names == ["ours"])


def check_measurement(m: dict[str, Any]) -> None:
    """4 prompts × 4 samples and 2 optimizer steps a batch, at most 8 tokens a response, one thread a process."""
    assert len(m["turns"]) == 2, "the warm-up is left out"
    assert m["runs_on"]["world_size"] == m["processes"]
    assert m["runs_on"]["threads"] == 1
    assert m["optimizer_steps_per_batch"] == 2
    for turn in m["turns"]:
        assert 16 <= turn["response_tokens"] <= 16 * 8
        phases = turn["phases_s"]
        assert min(phases["generate"], phases["old_logprobs"], phases["train"]) > 0
        assert (phases["hand_over"] > 0) == (m["side"] == "ours")
        assert phases["other"] > 0, "the phases overlap"
        assert turn["cpu_s"] > 0
        assert turn["peak_rss_bytes"] > m["processes"] * 100e6, "torch alone takes more"
    rates = sorted(16 / turn["seconds"] for turn in m["turns"])
    assert rates[0] <= m["completions_per_s"] <= rates[1]
    assert 0 <= m["clip_fraction"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers-python", "/nowhere/python"], "make setup-peers"),
        (["--sides", "ours,verl"], "'verl' is none of ours, trl"),
        (["--sides", "ours", "--processes", "3"], "--processes 3"),
        (["--sides", "ours", "--lengths", "32,x"], "--lengths '32,x'"),
        (["--sides", "ours", "--batches", "0"], "--batches 0"),
    ],
)
def test_what_the_user_got_wrong_is_said(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_different_work_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import benchmark_end_to_end as tool
    from end_to_end.job import Batch

    options = tool.argparse.Namespace(batches=1, learning_rate=1e-6)
    job = tool.make_job(tmp_path, tool.SIZES["tiny"], options, length=8, processes=1)

    def turn(**changes: Any) -> Any:
        work = {"prompts": [[5], [7]], "completions": 16, "old_logprob_sequences": 16, "optimizer_steps": 2}
        return tool.Turn(1.0, [Batch(**{**work, **changes})])

    tool.check_alike(job, 1, {"ours": turn(), "trl": turn(prompts=[[7], [5]])})
    with pytest.raises(RuntimeError, match="different prompts"):
        tool.check_alike(job, 1, {"ours": turn(), "trl": turn(prompts=[[5], [8]])})
    for name, value in {"optimizer_steps": 1, "completions": 8, "old_logprob_sequences": 0}.items():
        with pytest.raises(RuntimeError, match="batch 1 of trl did"):
            tool.check_alike(job, 1, {"ours": turn(), "trl": turn(**{name: value})})
