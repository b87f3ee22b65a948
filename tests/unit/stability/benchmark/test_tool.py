"""tools/stability_benchmark.py as it is called, as far as nothing has to run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.unit.stability.benchmark.benchmark_setup import SPEC, read_json, workplace, write_root

ROOT = Path(__file__).parents[4]
sys.path.insert(0, str(ROOT / "tools"))

import stability_benchmark as tool  # noqa: E402


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert tool.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "labtop"], 'unknown; use one of cluster, h200, laptop, smoke. Did you mean "laptop"?'),
        (["--preset", "laptop", "--experiment", "flip", "--plan"], '"flip" is unknown'),
        (["--spec", "gone.toml"], "gone.toml does not exist"),
        (["--preset", "laptop", "--jobs", "-1"], "must not be negative"),
        (["--preset", "laptop", "--budget-minutes", "nan"], "must not be negative"),
        (["--preset", "laptop", "--budget", "many"], "invalid float value"),
        ([], "one of the arguments --preset --spec is required"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in refusal(capsys, *arguments, "--folder", str(tmp_path))


def test_a_folder_of_another_benchmark_and_an_unknown_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "benchmark.toml").write_text("name = 'another'")
    assert "holds a benchmark with another" in refusal(capsys, "--preset", "smoke", "--folder", str(tmp_path))
    place = ["--preset", "smoke", "--folder", str(tmp_path / "new")]
    assert "is no cell of smoke" in refusal(capsys, *place, "--cell", "train-0")


def test_the_plan_names_cells_time_and_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tool.main(["--preset", "laptop", "--folder", str(tmp_path), "--experiment", "flips", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Each of five seeds: two models, each with its cold start and its measurement.
    assert sum(line.startswith("measure-") for line in lines) == 10
    assert sum(line.startswith("sft-") for line in lines) == 10
    assert any("minutes of one process left" in line for line in lines) and "needs gpus: 0" in lines
    assert not any(tmp_path.iterdir()), "a plan leaves nothing behind"


def test_the_plan_of_a_cluster_counts_its_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tool.main(["--preset", "cluster", "--folder", str(tmp_path), "--plan"]) == 0
    [left] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")]
    assert re.fullmatch(r"about \d+ hours of 32 GPUs left", left)


def test_needs_may_be_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_root(tmp_path, SPEC.replace('machine = "any"', 'machine = "any"\ngpus = "8 of any kind"'))
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.main(["--spec", str(tmp_path / "spec.toml"), "--folder", str(tmp_path / "runs"), "--plan"]) == 0
    assert "needs gpus: 8 of any kind" in capsys.readouterr().out


def test_a_run_ends_with_a_report_and_says_what_failed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_root(tmp_path, SPEC)
    place = workplace(tmp_path)
    (tmp_path / "broken").touch()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "Workplace", lambda folder, root: type(place)(folder, root, place.python))
    command = ["--spec", str(tmp_path / "spec.toml"), "--folder", str(tmp_path / "runs")]
    assert tool.main(command) == 1
    out, err = capsys.readouterr()
    assert err.count("failed: ") == 2 and "1 supported, 0 contradicted, 1 undecided" in out
    (tmp_path / "broken").unlink()
    assert tool.main(command) == 0
    assert "2 supported" in capsys.readouterr().out
    report = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "Nothing: every cell is done." in report
    [ran] = [read_json(path) for path in (tmp_path / "runs" / "environments").iterdir()]
    assert f"- versions: {ran['versions']}" in report and "- needs machine: any" in report
    moved = ran | {"commit": "0000000"}
    (tmp_path / "runs" / "environments" / "other.json").write_text(json.dumps(moved))
    assert tool.main([*command, "--report-only"]) == 0
    report = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "of 2 environments): 0000000" in report, "another commit's cells are not passed off as this one's"


def test_a_folder_that_cannot_be_written_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(capsys, "--preset", "smoke", "--folder", str(tmp_path / "file"))


def test_array_jobs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    assert tool.main(["--preset", "cluster", "--folder", str(tmp_path / "runs"), "--slurm", str(jobs)]) == 0
    assert f"sbatch {jobs}/train.sbatch" in capsys.readouterr().out
    runs = (jobs / "train.txt").read_text().splitlines()
    assert all(line.startswith("examples/qwen3_30b_a3b/config.toml --run.folder ") for line in runs)
    assert f"#SBATCH --array=0-{len(runs) - 1}%4" in (jobs / "train.sbatch").read_text()
    assert tool.main(["--preset", "smoke", "--folder", str(tmp_path / "two"), "--slurm", str(jobs)]) == 0
    say = capsys.readouterr().out
    assert "--dependency=afterany:$cold" in say and "--report-only" in say
    cells = (jobs / "sft.txt").read_text().split()
    assert f"#SBATCH --array=0-{len(cells) - 1}\n" in (jobs / "sft.sbatch").read_text()


@pytest.mark.parametrize("preset", ["h200", "cluster", "laptop", "smoke"])
def test_presets_pass_the_checks_of_their_configs(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--preset", preset, "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") >= 3 and "needs gpus: " in out
