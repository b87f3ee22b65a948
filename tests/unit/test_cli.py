"""The command line: one clear message and exit code 2 for what a user can get wrong, and nothing overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.cli import COMMANDS, main
from gspo_megatron.config_io import render_reference
from gspo_megatron.metrics import METRICS

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "quickstart" / "model"

TRAIN = """
[run]
folder = "{folder}"
[model]
path = "{model}"
init = "random"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[rollout]
prompts_per_batch = 8
samples_per_prompt = 4
max_response_tokens = 8
[data]
token_budget = 512
[eval]
prompts = 8
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def train(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(TRAIN.format(folder=tmp_path / "run", model=model))
    return path


@pytest.fixture
def sft(train: Path) -> Path:
    path = train.with_name("sft.toml")
    path.write_text(train.read_text() + "[sft]\nsteps = 2\nbatch_size = 8\n")
    return path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "gspo_megatron", *arguments],
        env=clean | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with 2 and say nothing but `error: …`."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    return err


# -- the commands themselves --


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE)


def test_no_command_is_an_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m gspo_megatron COMMAND" in capsys.readouterr().err


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "trian")
    assert 'unknown command "trian". Did you mean "train"?' in message and "Commands: train, sft" in message


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:  # argparse's way
        assert end.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].usage.split(" ")[0] in text and COMMANDS[name].summary in " ".join(text.split())


def test_metrics_and_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METRICS)
    assert all(description in line for description, line in zip(METRICS.values(), lines, strict=True))
    assert main(["settings"]) == 0
    assert capsys.readouterr().out == render_reference()


def test_help_needs_no_torch() -> None:
    code = "import sys; from gspo_megatron.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60).returncode == 0


# -- check --


def test_check_describes_a_run_without_starting_it(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(train), "--parallel.tensor", "2", "--parallel.data", "2"]) == 0
    text = capsys.readouterr().out
    for part in [
        "train ",
        "TP2 × DP2, 4 ranks",
        "embedded, not SGLang",
        "clip to [1 − 0.0003, 1 + 0.0004]",
        "prompts ",
    ]:
        assert part in text
    assert not (train.parent / "run").exists()


def test_check_knows_a_cold_start_by_its_section(sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(sft)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sft ") and "8 worked answers a step" in text


def test_check_uses_no_megatron_and_starts_no_process(train: Path) -> None:
    code = (
        "import sys, subprocess, multiprocessing.process as p\n"
        "def refuse(*a, **k): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse; p.BaseProcess.start = refuse\n"
        "from gspo_megatron.cli import main\n"
        f"assert main(['check', {str(train)!r}]) == 0\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'megatron']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- bad input --


@pytest.mark.parametrize("command", ["train", "sft", "eval", "check"])
def test_a_config_file_is_needed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{command} needs a config file first" in refusal(capsys, command)
    assert "needs a config file first" in refusal(capsys, command, "--run.seed", "3")
    assert "does not exist" in refusal(capsys, command, "no-such.toml")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--rollout.sample_per_prompt", "4"], 'Did you mean "--rollout.samples_per_prompt"?'),
        (["--rollout.samples_per_prompt", "1"], "a group of one has no advantage; use at least 2"),
        (["--rollout.samples_per_prompt", "four"], "must be an integer"),
        (["--parallel.tensor", "3"], "parallel.tensor=3 must divide num_attention_heads=4"),
        (["--parallel.expert", "2"], "must divide tensor×context×data=1"),
        (["--rollout.prompts_per_batch", "6"], "algorithm.mini_batches=4 must divide rollout.prompts_per_batch=6"),
        (["--data.token_budget", "8"], "data.token_budget=8 is smaller than one sequence"),
        (["--data.token_budget", "30"], "data.token_budget=30 is smaller than one sequence: prompt 0"),
        (["--rollout.max_response_tokens", "250", "--data.token_budget", "4096"], "exceeds the model's context"),
        (["--model.path", "no/such"], "model.path=no/such"),
        (["--model.init", "weights"], "holds no weights"),
        (["--task.name", "jsonl", "--task.dataset", "no.jsonl"], "no.jsonl"),
        (["--algorithm.clip_low", "0.2"], "allow_unusual_clip"),
    ],
)
def test_bad_settings_start_nothing(
    train: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    for command in ("train", "check"):
        assert expected in refusal(capsys, command, str(train), *overrides)
        assert not (train.parent / "run").exists()


def test_malformed_files(train: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    data = tmp_path / "train.jsonl"
    overrides = ["--task.name", "jsonl", "--task.dataset", str(data), "--task.holdout", "1"]
    data.write_text("")
    assert str(data) in refusal(capsys, "train", str(train), *overrides)
    data.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": \n')
    assert re.search(r"(line |:)2\b", refusal(capsys, "train", str(train), *overrides))
    (model / "config.json").write_text('{"model_type": "qwen4"}')
    assert 'Did you mean "qwen3"?' in refusal(capsys, "train", str(train))
    (model / "config.json").unlink()
    assert "config.json is missing" in refusal(capsys, "train", str(train))
    train.write_text("[run\n")
    assert "line 1" in refusal(capsys, "train", str(train))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_folder_that_holds_a_run_is_not_touched(
    command: str, train: Path, sft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train.parent / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refusal(capsys, command, str(sft if command == "sft" else train))
    assert "already holds a run (metrics.jsonl)" in message and "--run.overwrite" in message
    assert [p.name for p in folder.iterdir()] == ["metrics.jsonl"]
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_bad_input_found_before_overwriting_keeps_the_old_run(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train.parent / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    refusal(capsys, "train", str(train), "--run.overwrite", "--task.dataset", "spell_backwards")
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_report_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN_FOLDER" in refusal(capsys, "report")
    assert "does not exist" in refusal(capsys, "report", str(tmp_path / "none"))
    assert "no metrics.jsonl" in refusal(capsys, "report", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_process_ends_with_2_and_only_the_message(train: Path) -> None:
    done = run("train", str(train), "--algoritm.clip_low", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('error: unknown option "--algoritm.clip_low"') and done.stderr.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import sys; from gspo_megatron import cli\n"
        "def broken(arguments): raise RuntimeError('bug')\n"
        "cli.COMMANDS['broken'] = cli.Command('broken', 'x', broken); sys.exit(cli.main(['broken']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: bug" in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    code = f"{sys.executable} -m gspo_megatron settings | head -n 1"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "# Configuration\n" and done.stderr == ""


# -- as a rank --


def test_more_ranks_than_the_layout_needs(train: Path) -> None:
    """As one rank of eight, without a launcher."""
    done = run("train", str(train), RANK="0", WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert done.returncode == 2
    assert done.stderr == (
        "error: 8 ranks were started but parallel needs tensor×context×pipeline×data = 1×1×1×1 = 1; "
        "start 1 rank, or set parallel.data=8\n"
    )
    assert not (train.parent / "run").exists()


def test_fewer_ranks_than_the_layout_needs_under_torchrun(train: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gspo_megatron", "train", str(train), "--parallel.data", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    message = "error: 2 ranks were started but parallel needs tensor×context×pipeline×data = 1×1×1×4 = 4"
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert "exitcode  : 2" in done.stderr
    assert not (train.parent / "run").exists()
