"""The rendered script: its text, and what it does under programs that stand in for SLURM's.

tests/system/test_slurm.py runs it under a real SLURM.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.config import TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.slurm.plan import Run, plan_job
from gspo_megatron.slurm.request import JobRequest
from gspo_megatron.slurm.script import render

QUICKSTART = Path("examples/quickstart/gspo.toml")
COMMAND = ["slurm", "a b"]
STAND_INS = {
    "scontrol": r"""
case "$*" in
"show hostnames trainers") printf 'n1\nn2\n' ;;
"show hostnames servers") printf 'n3\nn4\n' ;;
"show node --oneliner n"*) echo "NodeName=$4 Arch=x NodeAddr=10.0.0.${4#n} NodeHostName=else OS=Linux" ;;
*) echo "scontrol $*" >> calls ;;
esac
""",
    # The step's own words are in $TRAIN.
    "srun": r"""
for word in "$@"; do case $word in --output=*) exec > "${word#--output=}" ;; esac; done
printf '%s\n' "srun $*" >> calls
case " $* " in
*" serve "*)
    trap 'echo "servers ended" >> calls; exit 0' TERM
    echo $$ > serve.pid
    [ -z "${SERVE:-}" ] || eval "$SERVE"
    printf '0: addresses = "x"\n1: addresses = "y"\n'
    while :; do /bin/sleep 0.05; done ;;
esac
echo "MASTER=$MASTER_ADDR:$MASTER_PORT THREADS=$OMP_NUM_THREADS" >> calls
eval "$TRAIN"
""",
    "scancel": 'echo "scancel $*" >> calls; kill -s TERM "$(cat serve.pid)"',
    "sleep": "exec /bin/sleep 0.05",
}


BASE = load_config(TrainConfig, QUICKSTART)


def script_of(request: JobRequest, *overrides: str, array: list[list[str]] | None = None) -> str:
    """The script of the quick start with overrides, `--section.key value` each."""
    runs = [_run((*overrides, *words)) for words in array or [[]]]
    return render(plan_job(runs, request, is_array=array is not None), command=COMMAND)


def _run(overrides: tuple[str, ...]) -> Run:
    """As `load_config` would read it, in a hundredth of the time."""
    config = BASE
    for flag, value in zip(overrides[::2], overrides[1::2], strict=True):
        section, key = flag.removeprefix("--").split(".")
        table = getattr(config, section)
        kind = float if getattr(table, key) is None else type(getattr(table, key))
        config = replace(config, **{section: replace(table, **{key: kind(value)})})
    return Run(QUICKSTART, overrides, config)


CPU = JobRequest(nodes=2, gpus_per_node=0, python="a python")


class Job:
    """A script that runs in a folder, under the stand-ins."""

    def __init__(self, folder: Path, script: str, **variables: str) -> None:
        for name, text in STAND_INS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        (folder / "job.sbatch").write_text(script)
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "trainers", "SLURM_JOB_NODELIST_HET_GROUP_0": "trainers"}
        job |= {"SLURM_JOB_NODELIST_HET_GROUP_1": "servers", "SLURM_JOB_ID_HET_GROUP_1": "12346", "TRAIN": "exit 0"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "OMP_NUM_THREADS"}
        job |= variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
        self.folder = folder
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(["bash", "job.sbatch"], cwd=folder, env=kept | job, text=True, **out)

    def calls(self) -> str:
        path = self.folder / "calls"
        return path.read_text() if path.exists() else ""

    def send(self, number: signal.Signals, after: str) -> None:
        """Signal the script when a call shows that it has come so far."""
        deadline = time.monotonic() + 20
        while after not in self.calls():
            assert time.monotonic() < deadline and self.process.poll() is None, self.calls()
            time.sleep(0.02)
        self.process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


REQUEUED = "scontrol requeue 12345\n"
SAVES_ON_USR1 = """
trap 'echo "ranks got USR1" >> calls; /bin/sleep 0.3; exit 75' USR1
echo listening >> calls; while :; do /bin/sleep 0.05; done
"""


def test_a_run_that_ends_is_done(tmp_path: Path) -> None:
    code, out = (job := Job(tmp_path, script_of(CPU))).wait()
    assert code == 0 and out.rstrip().endswith("done")
    train, meeting = job.calls().splitlines()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --wait=600 --output=runs/quickstart/gspo/slurm/12345/" in train
    assert train.endswith("rank a python -m gspo_megatron train examples/quickstart/gspo.toml --run.resume true")
    assert meeting == "MASTER=10.0.0.1:22345 THREADS=1"
    assert (tmp_path / "runs/quickstart/gspo/slurm/12345/restart_0/train.log").exists()


def test_a_rank_gets_its_numbers_from_slurm(tmp_path: Path) -> None:
    """What `sh -c` of the step does, with the variables of one task."""
    match = re.search(r"^as_rank=(.*)$", script_of(CPU), re.MULTILINE)
    assert match is not None
    [words] = shlex.split(match[1])
    task = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    show = ["sh", "-c", 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE"']
    done = subprocess.run(["sh", "-c", words, "rank", *show], env=os.environ | task, capture_output=True, text=True)
    assert done.stdout == "5 8 1 1\n"


def test_usr1_saves_and_comes_back(tmp_path: Path) -> None:
    job = Job(tmp_path, script_of(CPU), TRAIN=SAVES_ON_USR1)
    job.send(signal.SIGUSR1, after="listening")
    job.send(signal.SIGUSR1, after="ranks got USR1")  # a second one must not reach the ranks, it would end them at once
    code, out = job.wait()
    assert code == 0 and out.rstrip().endswith("saved; requeueing")
    assert job.calls().count("ranks got USR1") == 1 and job.calls().endswith(REQUEUED)


def test_usr2_saves_and_stays_away(tmp_path: Path) -> None:
    job = Job(tmp_path, script_of(CPU), TRAIN=SAVES_ON_USR1)
    job.send(signal.SIGUSR2, after="listening")
    job.send(signal.SIGUSR1, after="ranks got USR1")  # the time limit's does not change that
    code, out = job.wait()
    assert code == 75 and "stopped on SIGUSR2" in out
    assert job.calls().count("ranks got USR1") == 1 and REQUEUED not in job.calls()


def test_term_is_left_to_slurm_and_never_comes_back(tmp_path: Path) -> None:
    stops = "echo listening >> calls; trap 'echo again >> calls' USR1 TERM; /bin/sleep 0.5; exit 75"
    job = Job(tmp_path, script_of(CPU), TRAIN=stops)
    job.send(signal.SIGTERM, after="listening")
    code, out = job.wait()
    assert code == 75 and "stopped on SIGTERM" in out
    assert "again" not in job.calls() and REQUEUED not in job.calls()


def test_a_run_that_stops_by_its_own_deadline_comes_back(tmp_path: Path) -> None:
    code, _ = (job := Job(tmp_path, script_of(CPU), TRAIN="exit 75", SLURM_RESTART_COUNT="2")).wait()
    assert code == 0 and job.calls().endswith(REQUEUED)
    assert (tmp_path / "runs/quickstart/gspo/slurm/12345/restart_2").is_dir()


def test_restarts_are_bounded(tmp_path: Path) -> None:
    bounded = JobRequest(nodes=2, gpus_per_node=0, max_requeues=2)
    code, out = (job := Job(tmp_path, script_of(bounded), TRAIN="exit 75", SLURM_RESTART_COUNT="2")).wait()
    assert code == 75 and "after 2 restarts (--max-requeues 2)" in out and REQUEUED not in job.calls()


def test_ranks_that_the_signal_ends_before_they_listen_come_back(tmp_path: Path) -> None:
    job = Job(tmp_path, script_of(CPU), TRAIN="echo listening >> calls; exec /bin/sleep 20")
    job.send(signal.SIGUSR1, after="listening")
    assert job.wait()[0] == 0 and job.calls().endswith(REQUEUED)


@pytest.mark.parametrize("code", [1, 2, 137, 138])
def test_a_failure_is_shown_and_does_not_come_back(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, script_of(CPU), TRAIN=f"echo what went wrong; exit {code}")
    ended, out = job.wait()
    assert ended == code and f"failed with exit code {code}; the end of" in out and out.endswith("what went wrong\n")
    assert REQUEUED not in job.calls()


def test_an_array_has_a_run_for_each_index(tmp_path: Path) -> None:
    array = [["--run.folder", "a"], ["--run.folder", "b c", "--algorithm.name", "grpo", "--algorithm.clip_low", "0.2"]]
    script = script_of(JobRequest(nodes=1, gpus_per_node=0, array_limit=1), "--run.seed", "3", array=array)
    assert "#SBATCH --array=0-1%1\n" in script and "#SBATCH --output=%x-%A_%a.out\n" in script
    index = {"SLURM_ARRAY_JOB_ID": "12340", "SLURM_ARRAY_TASK_ID": "1"}
    code, _ = (job := Job(tmp_path, script, TRAIN="exit 75", **index)).wait()
    assert code == 0 and job.calls().endswith("scontrol requeue 12340_1\n")  # the bare number would be the whole array
    assert " --run.seed 3 --run.folder b c --algorithm.name grpo --algorithm.clip_low 0.2 --run.resume" in job.calls()
    assert (tmp_path / "b c/slurm/12340_1/restart_0").is_dir()
    (tmp_path / "other").mkdir()
    code, out = Job(tmp_path / "other", script, **(index | {"SLURM_ARRAY_TASK_ID": "2"})).wait()
    assert code == 2 and "has no run 2" in out


SERVED = ["--rollout.engine", "sglang", "--sglang.api_key_file", "the key", "--sglang.servers", "2"]


def test_servers_on_nodes_of_their_own(tmp_path: Path) -> None:
    request = JobRequest(
        nodes=2, gpus_per_node=0, cpus_per_rank=3, server_nodes=2, server_partition="cheap", python="python3"
    )
    script = script_of(request, *SERVED)
    head = script.split("\n\n")[0].splitlines()
    assert head.count("#SBATCH hetjob") == 1
    assert head[head.index("#SBATCH hetjob") + 1 :] == [
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --time=24:00:00",
        "#SBATCH --partition=cheap",
    ]
    code, _ = (job := Job(tmp_path, script)).wait()
    assert code == 0
    serve, train, _, cancel, ended = job.calls().splitlines()
    assert "--het-group=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=3 " in serve
    assert " serve examples/quickstart/gspo.toml --rollout.engine sglang --sglang.api_key_file the key " in serve
    assert serve.endswith("--sglang.host 0.0.0.0 --sglang.port 30000 --sglang.servers 2")
    assert "--het-group=0 --nodes=2 " in train and ended == "servers ended"
    assert cancel == "scancel --signal=TERM 12346.0"
    addresses = "http://10.0.0.3:30000,http://10.0.0.3:30001,http://10.0.0.4:30000,http://10.0.0.4:30001"
    assert train.endswith(f" --sglang.addresses {addresses} --run.resume true")


def test_servers_on_the_nodes_that_train(tmp_path: Path) -> None:
    script = script_of(CPU, *SERVED)
    assert "hetjob" not in script and "het-group" not in script
    code, _ = (job := Job(tmp_path, script)).wait()
    serve, train, *_ = job.calls().splitlines()
    assert code == 0 and " --overlap " in serve and " --overlap " in train
    assert "http://10.0.0.1:30000,http://10.0.0.1:30001,http://10.0.0.2:30000" in train
    assert job.calls().endswith("scancel --signal=TERM 12345.0\nservers ended\n")


def test_servers_that_do_not_start_end_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, script_of(CPU, *SERVED), SERVE="echo no port; exit 1")
    code, out = job.wait()
    assert code == 1 and "the servers did not start" in out and out.endswith("no port\n")
    assert " train " not in job.calls()


def test_a_signal_while_servers_start_comes_back_without_training(tmp_path: Path) -> None:
    job = Job(tmp_path, script_of(CPU, *SERVED), SERVE="while :; do /bin/sleep 0.05; done")
    job.send(signal.SIGUSR1, after=" serve ")
    code, _ = job.wait()
    assert code == 0 and " train " not in job.calls()
    assert job.calls().endswith("servers ended\n" + REQUEUED)


def test_a_container_and_a_prologue(tmp_path: Path) -> None:
    request = JobRequest(
        nodes=2, gpus_per_node=0, container_image="repo/image:1", container_mounts="/data:/data", prologue="the env.sh"
    )
    script = script_of(request)
    (tmp_path / "the env.sh").write_text("export OMP_NUM_THREADS=7\n")
    code, _ = (job := Job(tmp_path, script)).wait()
    assert code == 0 and "THREADS=7" in job.calls()
    here = tmp_path.resolve()
    assert (
        f"--container-image=repo/image:1 --container-workdir={here} --container-mounts={here}:{here},/data:/data"
        in (job.calls())
    )


PROLOGUE = JobRequest(nodes=2, gpus_per_node=0, prologue="the env.sh")


def test_a_prologue_runs_in_bash_as_it_comes(tmp_path: Path) -> None:
    """It may read what is not set and set what it likes, and the script's own settings hold after it."""
    text = """
export OMP_NUM_THREADS=7$NOBODY_SETS_THIS
if ! false | true; then return 1; fi
folder=elsewhere
set -e
"""
    (tmp_path / "the env.sh").write_text(text)
    code, out = (job := Job(tmp_path, script_of(PROLOGUE), TRAIN="exit 75")).wait()
    # With bash's -e, the step's 75 would have ended the script.
    assert code == 0 and job.calls().endswith(REQUEUED) and "prologue" not in out
    assert "THREADS=7" in job.calls() and "--output=runs/quickstart/gspo/slurm/" in job.calls()


@pytest.mark.parametrize(
    ("text", "expected"),
    [('[ -n "$X" ] && export Y=$X\n', 1), ("exit 3\n", 3), ("set -e\nfalse\ntrue\n", 1), (None, 1)],
)
def test_a_prologue_that_fails_is_named(tmp_path: Path, text: str | None, expected: int) -> None:
    if text is not None:  # else there is no such file
        (tmp_path / "the env.sh").write_text(text)
    code, out = (job := Job(tmp_path, script_of(PROLOGUE))).wait()
    assert code == expected and out.count("the prologue the env.sh ended the job with") == 1
    assert f"with {expected}; mend it, or end it with true if that is no failure\n" in out and job.calls() == ""


def test_a_command_of_many_lines_stays_a_comment(tmp_path: Path) -> None:
    words = ["slurm", "--task.prompt_template", "it's\ntouch broken\n#SBATCH --x \\n\r\x1b0\u2028é"]
    runs = [_run(("--task.prompt_template", words[2]))]
    lines = render(plan_job(runs, CPU), command=words).splitlines(keepends=True)
    assert lines[1].startswith("# Made by: slurm --task.prompt_template $'it\\'s\\ntouch broken\\n#SBATCH")
    assert lines[2] == "#SBATCH --job-name=gspo\n"
    # What it says is the command.
    command = lines[1].removeprefix("# Made by: ")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert shown.decode().split("\0")[:-1] == words
    job = Job(tmp_path, "".join(lines))
    assert job.wait()[0] == 0 and not (tmp_path / "broken").exists()
    # The words themselves are as they were given.
    assert f"--task.prompt_template {words[2]} --run.resume true" in (tmp_path / "calls").read_bytes().decode()


def test_values_of_sbatch_s_options_are_quoted_as_it_reads_them() -> None:
    """`sbatch -vvv` of 22.05.8 shows what it takes: backslashes count in quotes too, # ends a line."""
    options = ('--comment=a --no-requeue "b" \\ it\'s', "--mail-user=a#b", "--constraint=a&(b|c)", "-w n[1-2]")
    script = script_of(replace(CPU, sbatch=options))
    assert script.split("\n\n")[0].splitlines()[-4:] == [
        '#SBATCH --comment="a --no-requeue \\"b\\" \\\\ it\'s"',
        '#SBATCH --mail-user="a#b"',
        "#SBATCH --constraint=a&(b|c)",
        "#SBATCH -w n[1-2]",
    ]


def test_words_of_the_user_s_are_quoted(tmp_path: Path) -> None:
    evil = "$(touch broken)'`touch broken`\"; touch broken #"
    request = JobRequest(nodes=2, gpus_per_node=0, python=evil, container_image=evil, container_mounts=evil)
    script = script_of(request, "--run.folder", f"runs/{evil}", "--task.prompt_template", evil)
    Job(tmp_path, script).wait()
    assert not list(tmp_path.rglob("broken*"))
    assert evil in Job(tmp_path, script).calls()


def test_options_become_directives_in_a_fixed_order() -> None:
    request = JobRequest(
        nodes=4,
        cpus_per_rank=12,
        time="4:00:00",
        partition="p",
        account="a",
        sbatch=("--exclusive",),
        signal_lead_s=600,
    )
    head = script_of(request, "--parallel.data", "16").split("\n\n")[0]
    assert head.splitlines() == [
        "#!/bin/bash",
        "# Made by: slurm 'a b'",
        "#SBATCH --job-name=gspo",
        "#SBATCH --output=%x-%j.out",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --time=4:00:00",
        "#SBATCH --partition=p",
        "#SBATCH --account=a",
        "#SBATCH --exclusive",
    ]
