"""What a user asks SLURM for: times, options, and the command line that is split between SLURM and the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.errors import UserError
from gspo_megatron.slurm.request import JobRequest, parse, read_array, split_overrides


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        JobRequest(**({"nodes": 1} | values))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:30:15", 9015),
        ("1-0", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
    ],
)
def test_times_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert JobRequest(nodes=1, time=text).time_limit_s == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "UNLIMITED", "1 2"])
def test_times_that_are_none(text: str) -> None:
    assert f"--time {text!r} is no time" in refusal(time=text)


def test_the_signal_must_come_after_the_start() -> None:
    assert JobRequest(nodes=1, time="2", signal_lead_s=60).signal_lead_s == 60
    assert refusal(time="2", signal_lead_s=61).endswith("ask for more time, or for a lead of at most 60 s")
    assert refusal(time="1", signal_lead_s=1).endswith("ask for more time")
    assert "must lie between 1 and 65535" in refusal(signal_lead_s=65536, time="10-0")
    assert "must lie between 1 and 65535" in refusal(signal_lead_s=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nodes": 0}, "--nodes 0 must be at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1 must be at least 0"),
        ({"max_requeues": -1}, "--max-requeues -1 must be at least 0"),
        ({"partition": "a b"}, "--partition 'a b' is no name"),
        ({"account": "x\n#SBATCH --wrap=y"}, "is no name"),
        ({"job_name": "$(id)"}, "is no name"),
        ({"prologue": "a\nb"}, "--prologue 'a\\nb' holds a character that can't be printed"),
        ({"server_partition": "b"}, "--server-partition is not read without --server-nodes"),
        ({"server_gpus_per_node": 4}, "--server-gpus-per-node is not read without --server-nodes"),
        ({"container_mounts": "/a:/a"}, "is not read without --container-image"),
        ({"sbatch": ("exclusive",)}, "is not one option of sbatch; write each by itself and its value behind =, as in"),
        ({"sbatch": ("--comment=a\n#SBATCH --x",)}, "is not one option of sbatch"),
        ({"sbatch": ("--exclusive --no-requeue",)}, "--sbatch='--exclusive --no-requeue' is not one option of sbatch"),
        ({"sbatch": ("--mem 0",)}, "as in --sbatch=--exclusive --sbatch=--mem=0"),
        ({"sbatch": ("-O -t 10",)}, "is not one option of sbatch"),
        ({"sbatch": ("-O -t10",)}, "is not one option of sbatch"),
        ({"sbatch": ("-w n1#",)}, "is not one option of sbatch"),
        ({"sbatch": ("--no-req",)}, "use --max-requeues 0 instead"),
        ({"sbatch": ("--outp=x",)}, "which needs its own --output; leave it out"),
        ({"sbatch": ("--gpus=8",)}, "use --gpus-per-node instead"),
        ({"sbatch": ("--nodes=2",)}, "use --nodes instead"),
        ({"sbatch": ("-t 10",)}, "use --time instead"),
        ({"sbatch": ("--array=0-3",)}, "use --array instead"),
        ({"sbatch": ("--output=x",)}, "which needs its own --output; leave it out"),
    ],
)
def test_what_is_refused(values: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**values)


def test_further_options_of_sbatch() -> None:
    options = ("--exclusive", "--mail-type=END,FAIL", "-w node[1-4]", "--comment=a --no-requeue", "--time-min=5")
    assert JobRequest(nodes=1, sbatch=options).sbatch == options


def test_overrides_are_told_from_options_by_their_dot() -> None:
    tokens = ["--nodes", "2", "--run.seed", "3", "--submit", "--run.resume", "--optimizer.lr=1e-5", "--array", "a.txt"]
    own, overrides = split_overrides(tokens)
    assert own == ["--nodes", "2", "--submit", "--array", "a.txt"]
    assert overrides == ["--run.seed", "3", "--run.resume", "--optimizer.lr=1e-5"]


def parsed(*words: str) -> Any:
    return parse(words, "slurm CONFIG.toml", "Summary")


def test_a_command_line() -> None:
    arguments = parsed("a.toml", "--nodes", "2", "--sbatch=--exclusive", "--sbatch=-w n1", "--run.seed", "1")
    assert (arguments.config, arguments.overrides) == (Path("a.toml"), ("--run.seed", "1"))
    assert arguments.request.sbatch == ("--exclusive", "-w n1")
    assert arguments.request.python.endswith("python") or "/python" in arguments.request.python
    assert parsed("a.toml", "--nodes", "2", "--container-image", "x").request.python == "python3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "slurm needs a config file first: slurm CONFIG.toml"),
        (["--nodes", "1"], "slurm needs a config file first"),
        (["a.toml"], "the following arguments are required: --nodes"),
        (["a.toml", "--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["a.toml", "--nodes", "1", "--node-list", "x"], "unrecognized arguments: --node-list x"),
        (["a.toml", "--nodes", "1", "--tim", "x"], "unrecognized arguments: --tim x"),
        (["a.toml", "--nodes", "1", "--dry-run", "--submit"], "--dry-run does nothing but print"),
        (["a.toml", "--nodes", "1", "--overwrite"], "--overwrite is not read without --output"),
        (["a.toml", "--nodes", "1", "--array-limit", "2"], "is not read without --array FILE"),
    ],
)
def test_command_lines_that_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert expected in str(caught.value)


def test_array_files(tmp_path: Path) -> None:
    path = tmp_path / "array.txt"
    path.write_text("# comment\n\n--run.seed 1 --run.folder 'a b'\nother.toml\n")
    assert read_array(path) == [["--run.seed", "1", "--run.folder", "a b"], ["other.toml"]]
    path.write_text("--run.folder 'a\n")
    with pytest.raises(UserError, match="line 1 cannot be split: No closing quotation"):
        read_array(path)
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no line"):
        read_array(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_array(tmp_path / "missing")
