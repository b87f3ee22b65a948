"""Reward workers: results, failures, hangs, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.errors import UserError
from gspo_megatron.tasks import reward_worker
from gspo_megatron.tasks.worker_pool import Outcome, WorkerPool

ROOT = Path(__file__).parents[3]
REWARDS = '''
import asyncio, math, os, subprocess, sys, time

not_a_function = 3

def score(text, reference):
    """Does what the response says."""
    if text == "hang": time.sleep(60)
    if text == "spin":
        while True: pass
    if text == "c": sum(range(10**12))
    if text == "child":
        child = subprocess.Popen(["sleep", "60"]); open(reference["file"], "w").write(str(child.pid)); time.sleep(60)
    if text == "raise": raise RuntimeError(f"bad {reference}")
    if text == "die": os._exit(7)
    if text == "exit": sys.exit(3)
    if text == "nan": return math.nan
    if text == "inf": return -math.inf
    if text == "text": return "0.5"
    if text == "none": return None
    if text == "bool": return True
    if text == "pid": return os.getpid()
    if text == "torch": return float(any(m.split(".")[0] in ("torch", "megatron", "transformers") for m in sys.modules))
    if text == "main": return float("trainer" in getattr(sys.modules["__main__"], "__file__", ""))
    if text == "print": print("noise", flush=True); return 0.25
    if text == "sum": return float(sum(reference))
    return len(text) / 10

def one(text): return 1.0
def keyword(text, reference, *, scale): return scale * len(text)
async def later(text, reference): return 1.0
class Judge:
    def __init__(self, text, reference): self.value = 0.75
    def __float__(self): return self.value
'''


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's module, as the current folder."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def children() -> set[int]:
    """Living and zombie child processes of this one."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while alive(pid):
        assert time.monotonic() < end, f"process {pid} still lives"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_left_behind(rewards: Path) -> Iterator[None]:
    before = children()
    yield
    assert children() <= before, "a worker or a zombie is left"


def run(texts: list[str], reference: Any = None, *, workers: int = 1, timeout_s: float = 20.0) -> list[Outcome]:
    pool = WorkerPool("my_rewards:score", num_workers=workers, timeout_s=timeout_s)
    try:
        return pool.map([(text, reference) for text in texts])
    finally:
        pool.close()


def test_values_in_order() -> None:
    texts = ["x" * (i % 7) for i in range(50)]
    assert run(texts, workers=3) == [Outcome(len(text) / 10) for text in texts]
    assert run([]) == []
    assert run(["sum", "bool", "print"], [1, 2]) == [Outcome(3.0), Outcome(1.0), Outcome(0.25)]


def test_workers_share_nothing_with_the_trainer() -> None:
    torch_loaded, pid = run(["torch", "pid"])
    assert "torch" in sys.modules and torch_loaded.value == 0.0 and pid.value != os.getpid()


def test_failures_are_counted_with_their_reason() -> None:
    outcomes = run(["raise", "a", "nan", "inf", "text", "none", "exit", "ab"], "ref")
    assert [outcome.value for outcome in outcomes] == [None, 0.1, None, None, None, None, None, 0.2]
    assert [outcome.reason for outcome in outcomes] == [
        "RuntimeError: bad ref",
        None,
        "the reward is nan, which is no finite number",
        "the reward is -inf, which is no finite number",
        "the reward is '0.5', which is no finite number",
        "the reward is None, which is no finite number",
        "SystemExit: 3",
        None,
    ]
    assert not any(outcome.timed_out for outcome in outcomes)


@pytest.mark.parametrize("kind", ["hang", "spin", "c"])
def test_a_hanging_call_is_killed_and_the_rest_goes_on(kind: str) -> None:
    start = time.monotonic()
    outcomes = run(["a", kind, "ab", "abc"], timeout_s=1.0)
    assert [outcome.value for outcome in outcomes] == [0.1, None, 0.2, 0.3]
    assert outcomes[1].timed_out and outcomes[1].reason == "scoring took longer than 1 s"
    assert time.monotonic() - start < 15


def test_hangs_on_several_workers_time_out_together() -> None:
    pool = WorkerPool("my_rewards:score", num_workers=3, timeout_s=1.0)
    start = time.monotonic()
    outcomes = pool.map([("hang", None)] * 3 + [("a", None)])
    assert [outcome.timed_out for outcome in outcomes] == [True, True, True, False]
    assert time.monotonic() - start < 2.9  # three in a row would take 3 s
    assert pool.map([("ab", None)] * 5) == [Outcome(0.2)] * 5  # replaced workers serve the next batch
    pool.close()


def test_a_worker_that_dies_is_replaced() -> None:
    outcomes = run(["a", "die", "ab"])
    assert outcomes == [Outcome(0.1), Outcome(None, "the function ended its process with code 7"), Outcome(0.2)]


def test_a_worker_killed_while_idle_is_replaced() -> None:
    pool = WorkerPool("my_rewards:score", num_workers=1, timeout_s=20)
    (pid,) = pool.map([("pid", None)])
    assert pid.value is not None
    os.kill(int(pid.value), signal.SIGKILL)
    outcomes = pool.map([("a", None), ("a", None)])
    pool.close()
    assert outcomes[0].value is None and "code -9" in str(outcomes[0].reason) and outcomes[1].value == 0.1


def test_signals_that_a_scheduler_sends_to_all_leave_workers_alone() -> None:
    pool = WorkerPool("my_rewards:score", num_workers=1, timeout_s=20)
    (before,) = pool.map([("pid", None)])
    assert before.value is not None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(int(before.value), number)
    assert pool.map([("a", None), ("pid", None)]) == [Outcome(0.1), before]
    pool.close()


def test_what_the_function_started_is_killed_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    (outcome,) = run(["child"], {"file": str(file)}, timeout_s=2.0)
    assert outcome.timed_out
    wait_until_dead(int(file.read_text()), 5)


def test_a_reference_that_cannot_be_sent() -> None:
    outcomes = run(["a"], lambda: None) + run(["a"], 3)
    assert outcomes[0].value is None and "cannot be sent to a worker" in str(outcomes[0].reason)
    assert outcomes[1].value == 0.1


def test_close_twice() -> None:
    pool = WorkerPool("my_rewards:score", num_workers=2, timeout_s=5)
    pool.close()
    pool.close()


def test_keyword_arguments_and_callable_classes() -> None:
    pool = WorkerPool("my_rewards:keyword", num_workers=1, timeout_s=20, arguments={"scale": 2})
    assert pool.map([("abc", None)]) == [Outcome(6.0)]
    pool.close()
    pool = WorkerPool("my_rewards:Judge", num_workers=1, timeout_s=20)
    assert pool.map([("abc", None)]) == [Outcome(0.75)]
    pool.close()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_rewards", "task.reward='my_rewards' must be \"module:function\""),
        ("my_rewards.score", 'must be "module:function"'),
        ("my_rewards.py:score()", 'must be "module:function"'),
        (":score", 'must be "module:function"'),
        ("my_reward:score", "cannot import module \"my_reward\": ModuleNotFoundError: No module named 'my_reward'"),
        ("my_rewards:scor", 'has no "scor". Did you mean "score"'),
        ("my_rewards:not_a_function", '"not_a_function" is no function, it is of type int'),
        ("my_rewards:one", r'"one" cannot be called as one\(response_text, reference\): too many positional'),
        ("my_rewards:keyword", "missing a required argument: 'scale'"),
        ("my_rewards:later", '"later" is async'),
        ("broken:score", 'cannot import module "broken": ZeroDivisionError'),
        ("syntax:score", 'cannot import module "syntax": SyntaxError'),
        ("leaves:score", 'cannot import module "leaves": SystemExit: 4'),
        ("dies:score", "its process ended with code 9 while importing it"),
    ],
)
def test_bad_functions_are_refused_at_the_start(rewards: Path, target: str, message: str) -> None:
    (rewards / "broken.py").write_text("1 / 0")
    (rewards / "syntax.py").write_text("def (")
    (rewards / "leaves.py").write_text("import sys; sys.exit(4)")
    (rewards / "dies.py").write_text("import os; os._exit(9)")
    with pytest.raises(UserError, match=message):
        WorkerPool(target, num_workers=2, timeout_s=5)


def test_an_import_that_never_ends(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rewards / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr("gspo_megatron.tasks.worker_pool.STARTUP_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match=r"importing it takes longer than 0.5 s"):
        WorkerPool("slow:score", num_workers=1, timeout_s=5)


def test_the_scripts_neighbours_hide_no_package(rewards: Path) -> None:
    """The worker's script lies beside a reasoning_gym.py of ours."""
    (rewards / "gym.py").write_text(
        "import reasoning_gym\ndef score(text, reference): return len(reasoning_gym.__path__)"
    )
    pool = WorkerPool("gym:score", num_workers=1, timeout_s=20)
    assert pool.map([("a", None)]) == [Outcome(1.0)]
    pool.close()


def test_beside_a_process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        total = torch.ones(3)
        dist.all_reduce(total)
        assert [o.value for o in run(["a", "hang", "torch"], timeout_s=1.0)] == [0.1, None, 0.0]
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0, 1.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("text", "grace_s"), [("pid", 5.0), ("hang", 1.0 + reward_worker.ORPHAN_GRACE_S + 5.0)])
def test_workers_end_when_the_trainer_is_killed(rewards: Path, text: str, grace_s: float) -> None:
    """Idle ones by the closed pipe; one that hangs by its own alarm. The parent's __main__ is not loaded either."""
    (rewards / "trainer.py").write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from gspo_megatron.tasks.worker_pool import WorkerPool\n"
        "pool = WorkerPool('my_rewards:score', num_workers=1, timeout_s=1.0)\n"  # no __main__ guard
        "main, pid = pool.map([('main', None), ('pid', None)])\n"
        "print(int(main.value), int(pid.value), flush=True)\n"
        "pool._timeout_s = 60.0\n"  # this parent never gives up: only the worker can end itself
        "pool.map([(sys.argv[1], None)])\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "trainer.py", text], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    main, pid = map(int, trainer.stdout.readline().split())
    assert main == 0 and alive(pid)
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until_dead(pid, grace_s)
