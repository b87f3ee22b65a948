"""The examples and docs/slurm.md: scripts are what the command renders, commands run, figures are the estimate's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.preflight import check_train
from gspo_megatron.preflight.result import Preflight

ROOT = Path(__file__).parents[3]
QWEN = ROOT / "examples" / "qwen3_30b_a3b"
PAGES = [ROOT / "docs" / "slurm.md", QWEN / "README.md", ROOT / "examples" / "slurm" / "README.md"]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `slurm` command that a page shows."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())
    for line in text.splitlines():
        if line.strip().startswith("python -m gspo_megatron slurm "):
            yield shlex.split(line.strip())[3:]


def written_scripts() -> list[tuple[str, list[str]]]:
    """(file, command) of the scripts in the examples."""
    found = []
    for page in PAGES:
        for words in commands(page):
            if "--overwrite" in words:
                found.append((words[words.index("--output") + 1], words))
    return found


@pytest.mark.parametrize(("file", "words"), written_scripts())
def test_the_scripts_are_what_their_command_makes(
    file: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    words = [str(tmp_path / "new.sbatch") if word == file else word for word in words]
    assert main(words) == 0
    # Nothing in the script names the file that it is written to.
    assert Path("new.sbatch").read_text() == (ROOT / file).read_text(), f"render {file} anew, as its README says"


def test_every_script_of_the_examples_is_rendered() -> None:
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.sbatch")}
    assert scripts == {file for file, _ in written_scripts()} and len(scripts) == 3


def test_the_commands_of_the_pages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    seen = 0
    for page in PAGES:
        for words in commands(page):
            if "--overwrite" not in words:
                assert main([word for word in words if word != "--submit"]) == 0, (words, capsys.readouterr().err)
                seen += 1
    assert seen == 6


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published config.json, a tokenizer and no weights, and data of the two kinds."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copytree(ROOT / "examples" / "quickstart" / "model", folder / "model")
    shutil.copy(ROOT / "tools" / "reshard_models" / "qwen3_30b_a3b.json", folder / "model" / "config.json")
    for name, count, sign in (("train", 256, "+"), ("aime24", 30, "-")):
        rows = [json.dumps({"prompt": f"{i}{sign}1", "answer": "1"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def overrides(published: Path) -> list[str]:
    data = ["--task.dataset", str(published / "train.jsonl"), "--task.eval_dataset", str(published / "aime24.jsonl")]
    return ["--model.path", str(published / "model"), *data]


def checked(published: Path, *more: str) -> Preflight:
    return check_train(load_config(TrainConfig, QWEN / "config.toml", [*overrides(published), *more]), here=False)


def test_the_paper_s_setting_is_checked_without_weights_or_gpus(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(QWEN / "config.toml"), "--elsewhere", *overrides(published)]) == 0
    out = capsys.readouterr().out
    assert "48 layers, hidden size 2048, 128 experts of which 8 a token; its weights, bfloat16" in out
    assert "layout     TP4 × DP8 × EP8, 32 ranks" in out and "clip to [1 − 0.0003, 1 + 0.0004]" in out
    assert "warning" not in out


@pytest.mark.parametrize(("column", "more"), [(1, []), (2, ["--parallel.data", "16"])])
def test_the_memory_of_the_readme_is_the_estimate_s(published: Path, column: int, more: list[str]) -> None:
    [said] = [text for name, text in checked(published, *more).rows if name == "memory"]
    table = {
        cells[0].strip(" *"): cells[column].strip(" *")
        for line in (QWEN / "README.md").read_text().splitlines()
        if line.startswith("| ")
        for cells in [line.strip("|").split("|")]
    }
    assert said.startswith(f"about {table['training']} GB a rank")
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert f"{name} {table[name]} GB" in said
    weights = table["a server's weights"]
    assert f"a server's weights take {weights} GB of each of its GPUs" in said
