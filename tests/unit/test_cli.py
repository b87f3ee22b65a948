"""The command line: one clear message and exit code 2 for what a user can get wrong, and nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gspo_megatron.cli import COMMANDS, main
from gspo_megatron.config_io import render_reference
from gspo_megatron.metrics import METRICS
from gspo_megatron.weights.families import load_fields

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
    text = train.read_text().replace("prompts_per_batch = 8\nsamples_per_prompt = 4\n", "")
    path.write_text(text + "[sft]\nsteps = 2\nbatch_size = 8\n")
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
        (["--optimizer.clip_grad", "-1"], "optimizer.clip_grad=-1.0 must be at least 0; 0 switches clipping off"),
        (["--optimizer.beta1", "1"], "optimizer.beta1=1.0 must be at least 0 and below 1"),
        (["--optimizer.beta2", "-0.1"], "optimizer.beta2=-0.1 must be at least 0 and below 1"),
        (["--optimizer.weight_decay", "-0.1"], "optimizer.weight_decay=-0.1 must be at least 0"),
        (["--run.seed", "-1"], "run.seed=-1 must lie between 0 and 2147483647"),
        (["--run.seed", "2147483648"], "run.seed=2147483648 must lie between"),
        (["--log.samples_per_batch", "-1"], "log.samples_per_batch=-1 must be at least 0"),
        (["--parallel.pipeline", "4"], "parallel.pipeline=4 must divide num_hidden_layers=2; use 1 or 2"),
        (["--parallel.data", "6", "--parallel.expert", "3"], "parallel.expert=3 must divide num_experts=8; use 1 or 2"),
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


@pytest.fixture
def old_run(train: Path) -> Path:
    """The run folder, holding an earlier run."""
    folder = train.parent / "run"
    (folder / "final").mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl", "final/model.safetensors"):
        (folder / name).write_text(f"old {name}")
    return folder


def assert_untouched(folder: Path) -> None:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert [str(p.relative_to(folder)) for p in files] == ["config.toml", "final/model.safetensors", "metrics.jsonl"]
    assert all(p.read_text() == f"old {p.relative_to(folder)}" for p in files)


OVERWRITE = ["--run.overwrite"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("samples_per_prompt = 4", 'samples_per_prompt = "4"', "rollout.samples_per_prompt='4' must be an integer"),
        ("samples_per_prompt = 4", "samples_per_prompt = 4.0", "rollout.samples_per_prompt=4.0 must be an integer"),
        ("samples_per_prompt = 4", "samples_per_prompt = 1", "a group of one has no advantage; use at least 2"),
        ('init = "random"', 'init = "randm"', 'Did you mean "random"?'),
        ("samples_per_prompt", "sample_per_prompt", 'unknown key "sample_per_prompt" in section [rollout]. Did you'),
        ("[rollout]", "[rolout]", "unknown section [rolout]"),
        ("token_budget = 512", "token_budget = 8", "data.token_budget=8 is smaller than one sequence"),
        ("prompts_per_batch = 8", "prompts_per_batch = 6", "must divide rollout.prompts_per_batch=6"),
    ],
)
def test_mistakes_in_the_file_itself(
    train: Path, old_run: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, expected: str
) -> None:
    text = train.read_text()
    assert text.count(old) == 1
    train.write_text(text.replace(old, new))
    assert expected in refusal(capsys, "train", str(train), *OVERWRITE)
    assert_untouched(old_run)


def test_what_only_train_reads_is_refused_by_sft(sft: Path, old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "sft", str(sft), *OVERWRITE, "--rollout.truncated", "mask")
    assert 'unknown option "--rollout.truncated". Only `train` reads it; remove it.' in message
    sft.write_text(sft.read_text().replace("[rollout]", "[rollout]\ntemperature = 0.5"))
    message = refusal(capsys, "sft", str(sft), *OVERWRITE)
    assert 'unknown key "temperature" in section [rollout].' in message
    assert_untouched(old_run)


def test_a_target_that_is_never_looked_at(sft: Path, old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "sft", str(sft), *OVERWRITE, "--sft.target_accuracy", "0.5")
    assert "sft.target_accuracy=0.5" in message and "eval.every=0" in message
    assert_untouched(old_run)


def test_tensors_that_do_not_fit_the_model(
    train: Path, old_run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, fields = load_fields(model)
    pairs = [pair for s in family.specs(fields) for pair in zip(s.hf, s.hf_shapes, strict=True)]
    whole = {name: torch.zeros(shape) for name, shape in pairs}
    norm = "model.norm.weight"
    cases = [
        ({k: v for k, v in whole.items() if k != norm}, f"missing 1 ({norm})"),
        (whole | {"model.more.weight": torch.zeros(2)}, "unexpected 1 (model.more.weight)"),
        (whole | {norm: torch.zeros(7)}, f"{norm} is [7], config.json implies [128]"),
        (whole | {norm: torch.zeros(128, dtype=torch.int32)}, f"{norm} is stored as I32"),
    ]
    for tensors, expected in cases:
        save_file(tensors, model / "model.safetensors")
        message = refusal(capsys, "train", str(train), *OVERWRITE, "--model.init", "weights")
        assert expected in message and str(model) in message
    assert_untouched(old_run)


def test_models_that_are_not_supported(
    train: Path, old_run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"model_type": "qwen3_mo"}))
    message = refusal(capsys, "train", str(train), *OVERWRITE)
    assert 'model_type "qwen3_mo" is not supported' in message and 'Did you mean "qwen3_moe"?' in message
    path.write_text(json.dumps(content | {"num_experts_per_tok": 1, "norm_topk_prob": True}))
    assert "num_experts_per_tok=1 with norm_topk_prob=true" in refusal(capsys, "train", str(train), *OVERWRITE)
    assert_untouched(old_run)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_late_row_that_cannot_be_used(
    command: str, train: Path, sft: Path, old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = train.parent / "rows.jsonl"
    config = str(sft if command == "sft" else train)
    arguments = [
        command,
        config,
        *OVERWRITE,
        "--task.name",
        "jsonl",
        "--task.dataset",
        str(data),
        "--task.holdout",
        "8",
    ]
    rows = [{"prompt": chr(97 + i % 26) + chr(97 + i // 26), "answer": "ba"} for i in range(120)]
    for bad, expected in [
        ({"prompt": "a" * 300, "answer": "ba"}, "max_position_embeddings=256"),
        ({"prompt": "語", "answer": "ba"}, "characters that are no token: ['語']"),
    ]:
        rows[100] = bad
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = refusal(capsys, *arguments)
        assert message.startswith(f"error: {data}:101") and expected in message
    assert_untouched(old_run)


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


@pytest.mark.parametrize("command", ["check", "train"])
def test_without_the_extension_native_kernels_are_refused(command: str, train: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['gspo_megatron._C'] = None\n")  # not to be had
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "gspo_megatron", command, str(train), *overrides]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True)

    result = run()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "make setup" in result.stderr and 'kernels.implementation="reference"' in result.stderr
    assert not (tmp_path / "run").exists()
    if command == "check":
        assert run("--kernels.implementation", "reference").returncode == 0


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


def test_fewer_ranks_than_the_layout_needs(train: Path, old_run: Path) -> None:
    """As one rank of two, without a launcher."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run("train", str(train), *OVERWRITE, "--parallel.data", "4", **environment)
    assert done.returncode == 2
    assert done.stderr == (
        "error: 2 ranks were started but parallel needs tensor×context×pipeline×data = 1×1×1×4 = 4; "
        "start 4 ranks, or set parallel.data=2\n"
    )
    assert_untouched(old_run)


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
