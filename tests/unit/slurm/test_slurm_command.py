"""`python -m gspo_megatron slurm`: printed, written, submitted, refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.errors import UserError
from gspo_megatron.preflight import check_train

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "quickstart" / "model"
CONFIG = """
[run]
folder = "runs/x"
[model]
path = "{model}"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[rollout]
max_response_tokens = 16
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("train.toml")
    path.write_text(CONFIG.format(model=MODEL))
    return path


ONE_NODE = ["--nodes", "1", "--gpus-per-node", "1"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


def test_a_dry_run_prints_script_and_plan_apart(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", str(config), *ONE_NODE, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(
        "#!/bin/bash\n# Made by: python -m gspo_megatron slurm train.toml --nodes 1 --gpus-per-node 1\n"
    )
    assert "run=(train.toml)\n" in out and out.endswith("SLURM ends a job that it has requeued\n")
    assert err.splitlines()[1].startswith("trainer    1 node, 1 rank on each, one a GPU")
    assert main(["slurm", str(config), *ONE_NODE]) == 0
    assert capsys.readouterr().out == out
    assert list(Path().iterdir()) == [config]


def test_the_script_is_written_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["slurm", str(config), *ONE_NODE, "--output", "job.sbatch"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("written to job.sbatch; submit it with: sbatch job.sbatch\n")
    script = Path("job.sbatch").read_text()
    assert "--output job.sbatch" not in script
    assert "--output job.sbatch exists; give another file, or --overwrite" in refusal(capsys, *command[1:])
    Path("job.sbatch").write_text("old")
    assert main([*command, "--overwrite"]) == 0
    assert Path("job.sbatch").read_text() == script
    capsys.readouterr()
    assert "cannot be written: No such file" in refusal(capsys, str(config), *ONE_NODE, "--output", "no/such/file")


def stand_in_for_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_submitting(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in_for_sbatch(tmp_path, monkeypatch, 'echo "$*" > words; cat > script; echo 42')
    assert main(["slurm", str(config), *ONE_NODE, "--submit"]) == 0
    assert capsys.readouterr().out.endswith("submitted as job 42\n")
    assert Path("words").read_text() == "--parsable\n"
    assert Path("script").read_text().startswith("#!/bin/bash\n")


def test_a_job_that_sbatch_refuses(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in_for_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    message = refusal(capsys, str(config), *ONE_NODE, "--partition", "x", "--submit")
    assert "--submit: sbatch refuses the job: sbatch: error: invalid partition specified: x" in message


def test_no_sbatch_here(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch here; use --output FILE" in refusal(capsys, str(config), *ONE_NODE, "--submit")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing.toml", *ONE_NODE], "config file missing.toml does not exist"),
        (["sft.toml", *ONE_NODE], "sft.toml is a config of sft, which can't be resumed"),
        (["train.toml", *ONE_NODE, "--run.overwrite"], "run.resume=true keeps the run in the folder"),
        (["train.toml", *ONE_NODE, "--run.sead", "1"], 'unknown option "--run.sead"'),
        (["train.toml", *ONE_NODE, "--parallel.data", "2"], "use --nodes 2 or --gpus-per-node 2 or --parallel.data 1"),
        # What no machine could run is refused; what only this one lacks is not.
        (["train.toml", "--nodes", "1", "--gpus-per-node", "16", "--parallel.tensor", "16"], "use 1 or 2"),
        (["train.toml", *ONE_NODE, "--array", "runs.txt"], "--array runs.txt, run 2: run.seed=-1 must lie between"),
        (
            ["train.toml", *ONE_NODE, "--array", "model.txt"],
            "--array model.txt, run 1: rollout.max_response_tokens=999",
        ),
    ],
)
def test_what_is_refused(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    Path("sft.toml").write_text("[sft]\n")
    Path("runs.txt").write_text("--run.folder a\n--run.folder b --run.seed -1\n")
    Path("model.txt").write_text("--rollout.max_response_tokens 999\n")
    assert expected in refusal(capsys, *arguments)


def test_an_array_takes_its_config_files_from_its_lines(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.toml").write_text(config.read_text().replace("runs/x", "runs/other"))
    Path("runs.txt").write_text("--run.seed 2\nother.toml\n")
    assert main(["slurm", str(config), *ONE_NODE, "--array", "runs.txt", "--train.rollout_batches", "3"]) == 0
    out = capsys.readouterr().out
    assert "run=(train.toml --train.rollout_batches 3 --run.seed 2)\n        folder=runs/x\n" in out
    assert "run=(other.toml --train.rollout_batches 3)\n        folder=runs/other\n" in out


def test_a_model_that_is_not_here_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", str(config), *ONE_NODE, "--model.path", "/data/model"]) == 0
    assert "warning: model.path=/data/model is not on this machine" in capsys.readouterr().err


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--signal-lead-s S" in out and "--server-nodes N" in out


def test_a_check_for_another_machine(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPUs, SGLang and weights that this machine lacks are no reason to refuse a run for another one."""
    settings = (
        'dtype = "bfloat16"\n[memory]\noffload_optimizer = 1.0\n[sglang]\npython = "/no/python"\ntensor = 2\nexpert = 2'
    )
    text = config.read_text().replace("[task]", f"{settings}\n[task]") + 'engine = "sglang"\n'
    config.write_text(text)
    made = load_config(TrainConfig, config)
    with pytest.raises(UserError) as here:
        check_train(made)
    for said in ("there is no GPU", "model.safetensors", "SGLang spreads experts over GPUs only"):
        assert said in str(here.value)
    assert main(["check", str(config), "--elsewhere"]) == 0
    assert "SGLang, 1 server of TP2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sglang\.tensor=6 must divide num_attention_heads=4"):
        check_train(replace(made, sglang=replace(made.sglang, tensor=6)), here=False)


def test_weights_that_are_there_must_be_the_config_s(config: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    config.write_text(CONFIG.format(model=tmp_path / "model"))
    with pytest.raises(UserError, match="missing"):
        check_train(load_config(TrainConfig, config), here=False)
