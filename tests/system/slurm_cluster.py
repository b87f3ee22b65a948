"""A real SLURM on this machine for tests: munged, slurmctld and one slurmd a node, on loopback, in a folder of its own.

Nodes are slurmd processes with names that resolve nowhere, as where only SLURM knows its nodes; all have the address
127.0.0.1. CPUs are overstated. tools/setup_slurm.sh installs the programs.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CPUS = 8  # of each node, whatever the machine has
START_S = 30.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# The delay of a requeued job follows munge's cred_expire. No cgroups, no accounting: nothing of the host is changed.
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
StateSaveLocation={root}/state
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/slurmd.%n.log
SlurmdSpoolDir={root}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
KillWait=30
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO
"""


class SlurmCluster:
    """Daemons of one cluster. Use `open_cluster`."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.nodes = root, [f"gspo{i}" for i in range(1, nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        for folder in (self.root, self.root / "munge"):
            folder.chmod(0o755)  # munged refuses a socket in a folder that its clients can't enter
        self._write_config()
        key = self.root / "munge" / "key"
        with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
            file.write(secrets.token_bytes(1024))
        munge = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={self.root / 'munge' / name}" for option, name in munge.items()]
        self._daemon("munged", "--foreground", *files)
        self._until(lambda: (self.root / "munge" / "socket").exists(), "munged is ready")
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(self._is_idle, "all nodes are idle")

    def stop(self) -> None:
        """Cancel every job, then end the daemons, the last one first."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", f"--user={getpass.getuser()}", timeout=20)
            self._until(lambda: not self.run("squeue", "--noheader").strip(), "no job is left", limit_s=60)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _write_config(self) -> None:
        free = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(self.nodes) + 1)]
        ports = [listener.getsockname()[1] for listener in free]
        for listener in free:
            listener.close()
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs={CPUS} RealMemory=4000"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIG.format(port=ports[0], user=getpass.getuser(), root=self.root, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(text)

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.root / "daemons.log", "ab") as log:
            started = subprocess.Popen(
                [shutil.which(program, path=self.environment["PATH"]) or program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which cancel the jobs first
            )
        self._daemons.append(started)

    def _is_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", timeout=5).split("\n")
        except subprocess.SubprocessError:
            return False
        return sorted({s for s in states if s}) == sorted(f"{node} idle" for node in self.nodes)

    def _until(self, condition: object, what: str, limit_s: float = START_S) -> None:
        assert callable(condition)
        deadline = time.monotonic() + limit_s
        while not condition():
            ended = [d.args for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}:\n{p.read_text()[-2000:]}" for p in sorted(self.root.glob("*.log")))
                raise AssertionError(f"SLURM: not reached: {what}; daemons that ended: {ended}\n{logs}")
            time.sleep(0.1)

    # -- what users do --

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60.0, input: str | None = None) -> str:
        """Run a program of SLURM's; returns what it printed. Raises CalledProcessError."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout, input=input
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr + str(self.root))
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job, such as PENDING."""
        return self.fields(job)["JobState"]

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).strip().split("\n")[0]
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def wait(self, job: str, states: Sequence[str] | set[str] = ENDED, *, limit_s: float = 240.0) -> str:
        """Wait until the job is in one of the states; returns it."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {limit_s} s:\n{self.fields(job)}"
            time.sleep(0.2)
        return state


def find_missing() -> list[str]:
    """Programs of SLURM's that this machine lacks."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextlib.contextmanager
def open_cluster(nodes: int = 2) -> Iterator[SlurmCluster]:
    """A cluster for as long as the context lasts. A missing program is a failure, no reason to skip."""
    missing = find_missing()
    assert not missing, f"{', '.join(missing)} not found: run `make setup-slurm` (as root)"
    root = Path(tempfile.mkdtemp(prefix="gspo_slurm_"))  # short: a socket's path has 107 characters at most
    cluster = SlurmCluster(root, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
