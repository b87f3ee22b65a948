"""Jobs that `slurm` makes, under a real SLURM: two nodes on this machine, over gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.sglang_setup import sglang_python, write_model
from tests.system.slurm_cluster import SlurmCluster, open_cluster

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "quickstart" / "model"
CONFIG = """
[run]
folder = "{folder}/run"
[model]
path = "{model}"
init = "{init}"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[parallel]
data = 2
[algorithm]
mini_batches = 1
[rollout]
engine = "{engine}"
prompts_per_batch = 4
samples_per_prompt = 2
max_response_tokens = 4
[eval]
prompts = 4
[checkpoint]
every = {every}
[train]
rollout_batches = {batches}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with open_cluster(nodes=2) as made:
        made.environment["PYTHONPATH"] = str(ROOT)  # of jobs too
        yield made


class Job:
    """A job in a folder of its own, made by the command."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *options: str, batches: int = 40, every: int = 0) -> None:
        self.cluster, self.folder = cluster, folder
        self.write_config(batches=batches, every=every)
        self.options = options

    def write_config(
        self, *, batches: int, every: int = 0, model: Path = MODEL, init: str = "random", engine: str = "embedded"
    ) -> None:
        text = CONFIG.format(folder=self.folder, model=model, init=init, engine=engine, batches=batches, every=every)
        (self.folder / "train.toml").write_text(text)

    def submit(self, *sbatch_options: str) -> None:
        """Make the script, and hand it to sbatch."""
        command = [sys.executable, "-m", "gspo_megatron", "slurm", "train.toml", "--gpus-per-node", "0", *self.options]
        done = subprocess.run(
            [*command, "--overwrite", "--output", "job.sbatch"],
            cwd=self.folder,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.id = self.cluster.run("sbatch", "--parsable", *sbatch_options, "job.sbatch", cwd=self.folder).strip()

    def wait_for_rows(self, count: int, folder: str = "run", limit_s: float = 240.0) -> None:
        """Wait until metrics.jsonl has so many rows."""
        deadline = time.monotonic() + limit_s
        while len(self.rows(folder)) < count:
            assert time.monotonic() < deadline, self.said()
            assert self.cluster.state(self.id) in ("PENDING", "RUNNING", "CONFIGURING"), self.said()
            time.sleep(0.1)

    def rows(self, folder: str = "run") -> list[dict[str, object]]:
        path = self.folder / folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self) -> str:
        return self.cluster.wait(self.id)

    def said(self) -> str:
        """All that the job and its steps have said."""
        logs = [*self.folder.glob("*.out"), *sorted(self.folder.glob("*/slurm/*/*/*"))]
        return "\n".join(f"--- {path.relative_to(self.folder)}\n{path.read_text()}" for path in logs)

    def starts(self, folder: str = "run") -> list[str]:
        """Log folders of the starts, in order."""
        return sorted(path.name for path in (self.folder / folder / "slurm").glob("*/*"))

    def processes(self) -> list[psutil.Process]:
        """What runs for this job, by its environment; srun and the script itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            ours = environment.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
            if ours and environment.get("SLURM_JOB_ID") == self.id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def wait_gone(self, limit_s: float = 60.0) -> None:
        """Wait until no process of the job is left."""
        deadline = time.monotonic() + limit_s
        while left := self.processes():
            assert time.monotonic() < deadline, [(p.pid, p.cmdline()) for p in left]
            time.sleep(0.2)


def check_steps(job: Job, batches: int, folder: str = "run") -> None:
    """Every rollout batch once, and the weights at the end."""
    assert [row["step"] for row in job.rows(folder)] == list(range(batches + 1)), job.said()
    assert (job.folder / folder / "final" / "model.safetensors").is_file()


def test_a_job_that_is_told_to_save_comes_back_and_finishes(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The shortest way round: USR1 to the script, as SLURM sends it before the time limit."""
    job = Job(cluster, tmp_path, "--nodes", "1", batches=40)
    job.submit()
    job.wait_for_rows(5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    assert job.wait() == "COMPLETED", job.said()
    assert job.starts() == ["restart_0", "restart_1"]
    out = (tmp_path / f"run-{job.id}.out").read_text()
    assert out.count("told to save") == out.count("saved; requeueing") == 1 and out.endswith("done\n")
    check_steps(job, 40)
    job.wait_gone()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_time_limit_s_signal_comes_before_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A limit of two minutes; SLURM, which looks every 30 s, signals 40 to 70 s after the start. Again until the run is
    through, across both nodes."""
    batches = 1100  # more than a minute's work on any machine
    job = Job(cluster, tmp_path, "--nodes", "2", batches=batches)
    job.submit("--time=2", "--signal=B:USR1@50")
    assert cluster.wait(job.id, limit_s=1400) == "COMPLETED", job.said()
    assert len(job.starts()) >= 2, job.said()
    check_steps(job, batches)


@pytest.mark.slow
def test_a_job_trains_across_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--nodes", "2", batches=5)
    job.submit()
    assert job.wait() == "COMPLETED", job.said()
    check_steps(job, 5)
    assert cluster.fields(job.id)["NodeList"] == "gspo[1-2]" and cluster.fields(job.id)["NumTasks"] == "2"


@pytest.mark.slow
def test_scancel_leaves_no_process_and_a_checkpoint(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--nodes", "2", batches=60)
    job.submit()
    job.wait_for_rows(5)
    assert len(job.processes()) >= 4  # the script, srun, two ranks
    cluster.run("scancel", job.id)
    assert job.wait() == "CANCELLED"
    job.wait_gone()
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")), job.said()
    time.sleep(8)  # SLURM would start a requeued job again by now
    assert cluster.state(job.id) == "CANCELLED" and job.starts() == ["restart_0"]
    rows = len(job.rows())
    job.submit()  # a new job goes on where the cancelled one has saved
    assert job.wait() == "COMPLETED", job.said()
    check_steps(job, 60)
    assert rows < 61


@pytest.mark.slow
def test_usr2_saves_and_stays_away(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--nodes", "1", batches=60)
    job.submit()
    job.wait_for_rows(5)
    cluster.run("scancel", "--batch", "--signal=USR2", job.id)
    assert job.wait() == "FAILED"
    assert cluster.fields(job.id)["ExitCode"] == "75:0" and job.starts() == ["restart_0"]
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_node_that_goes_away_costs_what_was_not_saved(cluster: SlurmCluster, tmp_path: Path) -> None:
    """SLURM requeues the job; it goes on from the last checkpoint, no step twice in the metrics."""
    job = Job(cluster, tmp_path, "--nodes", "2", batches=60, every=5)
    job.submit()
    job.wait_for_rows(20)
    cluster.run("scontrol", "update", "nodename=gspo2", "state=down", "reason=test")
    # The node registers again by itself.
    assert job.wait() == "COMPLETED", job.said()
    assert job.starts() == ["restart_0", "restart_1"]
    check_steps(job, 60)


@pytest.mark.slow
def test_an_array_runs_each_of_its_lines(cluster: SlurmCluster, tmp_path: Path) -> None:
    lines = [f"--run.folder {tmp_path}/{name} --algorithm.name {name}" for name in ("gspo", "grpo")]
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    job = Job(cluster, tmp_path, "--nodes", "1", "--array", "runs.txt", batches=40)
    job.submit()
    job.wait_for_rows(5, "gspo")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job.id}_0")  # one of them comes back, the other runs on
    for index, name in enumerate(("gspo", "grpo")):
        assert cluster.wait(f"{job.id}_{index}") == "COMPLETED", job.said()
        check_steps(job, 40, name)
    assert (job.starts("gspo"), job.starts("grpo")) == (["restart_0", "restart_1"], ["restart_0"])


@pytest.mark.slow
def test_a_heterogeneous_job_with_sglang_servers(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Trainer on one node, a real SGLang server on the other; told to save, both come back."""
    key = tmp_path / "key"
    key.write_text("a-key-for-tests\n")
    key.chmod(0o600)
    options = ["--sglang.python", str(sglang_python()), "--sglang.api_key_file", str(key), "--server-nodes", "1"]
    job = Job(cluster, tmp_path, "--nodes", "1", *options, "--sglang.port", "31877")
    model = write_model(tmp_path / "model")
    job.write_config(batches=12, model=model, init="weights", engine="sglang")
    job.submit()
    assert "a-key-for-tests" not in (tmp_path / "job.sbatch").read_text()
    job.wait_for_rows(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    assert cluster.wait(job.id, limit_s=400) == "COMPLETED", job.said()
    assert job.starts() == ["restart_0", "restart_1"]
    check_steps(job, 12)
    for start in ("restart_0", "restart_1"):
        served = (tmp_path / "run" / "slurm" / job.id / start / "serve.log").read_text()
        assert ":31877, ready after" in served and served.rstrip().endswith("stopped"), served
    assert all(str(row["engine"]).startswith("sglang ") for row in job.rows())
    job.wait_gone()


@pytest.mark.slow
def test_the_commands_of_the_documentation(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Every block of docs/slurm.md, as a user types them; what it submits starts, and trains."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = cluster.environment | {"PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"}
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        if "sbatch job.sbatch" not in block:
            continue
        found = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert found is not None, done.stdout
        job = Job(cluster, tmp_path)
        job.id = found[1]
        job.wait_for_rows(2, "runs/slurm")
        cluster.run("scancel", job.id)
        assert job.wait() == "CANCELLED"
    ids = {line.split("_")[0] for line in cluster.run("squeue", "--noheader", "--array", "--format=%i").split()}
    assert len(ids) == 1  # the array
    cluster.run("scancel", *ids)
    assert (tmp_path / "gspo_key").stat().st_mode & 0o077 == 0


def test_scripts_are_clean_to_shellcheck(tmp_path: Path) -> None:
    """With and without servers, container, prologue and array."""
    (tmp_path / "runs.txt").write_text(f"--run.folder {tmp_path}/a\n--run.folder {tmp_path}/b\n")
    (tmp_path / "train.toml").write_text(
        CONFIG.format(folder=tmp_path, model="none", init="random", engine="embedded", batches=1, every=1)
    )
    served = ["--rollout.engine", "sglang", "--sglang.api_key_file", "key"]
    variants = [[], ["--array", "runs.txt"], served, [*served, "--server-nodes", "1"]]
    variants += [[*served, "--container-image", "an image", "--container-mounts", "/a b:/c", "--prologue", "the env"]]
    for options in variants:
        command = [sys.executable, "-m", "gspo_megatron", "slurm", "train.toml", "--nodes", "2", "--gpus-per-node", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        made = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        checked = subprocess.run(["shellcheck", "-"], input=made.stdout, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
