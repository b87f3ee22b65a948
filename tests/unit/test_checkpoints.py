"""Checkpoint folders: which are whole, which are kept, what is said of damage; and work beside the trainer."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gspo_megatron import checkpoints
from gspo_megatron.background import Background, SharedMemory
from gspo_megatron.checkpoints import TrainerState
from gspo_megatron.errors import UserError
from gspo_megatron.weights.torch_dist.checksums import write_checksums

STATE = TrainerState(8, 8, 64, 100, 200, 32, 32)


def make(run: Path, batch: int) -> Path:
    partial = run / checkpoints.FOLDER / checkpoints.partial_of(batch)
    (partial / "hf").mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * 10)
    (partial / "hf" / "config.json").write_text("{}")
    checkpoints.write_trainer_state(partial, STATE)
    write_checksums(partial)
    return checkpoints.publish(run, batch)


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints.complete(run)]


def test_a_checkpoint_appears_when_it_is_complete(tmp_path: Path) -> None:
    assert names(tmp_path) == []
    (tmp_path / "checkpoints" / ".step_00000004.partial").mkdir(parents=True)
    assert names(tmp_path) == []
    for batch in (2, 123456789, 3):
        made = make(tmp_path, batch)
        assert checkpoints.batch_of(made) == batch
        assert (tmp_path / "checkpoints" / "latest").read_text() == made.name + "\n"
    assert names(tmp_path) == ["step_123456789", "step_00000003", "step_00000002"]
    checkpoints.name_latest(tmp_path, checkpoints.complete(tmp_path)[1])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    checkpoints.remove_partial(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoints.read_trainer_state(made) == STATE and checkpoints.damage(made) == []


def test_a_state_without_the_gate_is_read(tmp_path: Path) -> None:
    values = asdict(replace(STATE, engine_logprobs=1))
    checkpoints.write_json(tmp_path / checkpoints.TRAINER, values)
    assert checkpoints.read_trainer_state(tmp_path).engine_logprobs == 1
    del values["engine_logprobs"]
    checkpoints.write_json(tmp_path / checkpoints.TRAINER, values)
    assert checkpoints.read_trainer_state(tmp_path) == STATE


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [6]), (2, 0, [6, 5]), (9, 0, [6, 5, 4, 3, 2, 1]), (1, 3, [6, 3]), (2, 2, [6, 5, 4, 2])],
)
def test_old_checkpoints_go(keep_last: int, keep_every: int, kept: list[int], tmp_path: Path) -> None:
    for batch in range(1, 7):
        make(tmp_path, batch)
        checkpoints.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert names(tmp_path) == [checkpoints.name_of(batch) for batch in kept]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {*names(tmp_path), "latest"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: os.truncate(p / "__0_0.distcp", 2000), "__0_0.distcp has 2000 bytes, should have 2560"),
        (lambda p: flip(p / "__0_0.distcp"), "__0_0.distcp is damaged"),
        (lambda p: (p / "hf" / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "extra").touch(), "extra is not in checksums.json"),
        (lambda p: (p / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda p: (p / "checksums.json").write_text("[1]"), "checksums.json holds no checksums"),
        (lambda p: flip(p / "trainer.json"), "trainer.json is damaged"),
    ],
)
@pytest.mark.parametrize("readers", [1, 3])
def test_damage_is_found_and_named(harm: Callable[[Path], object], said: str, readers: int, tmp_path: Path) -> None:
    path = make(tmp_path, 4)
    harm(path)
    lines = [line for r in range(readers) for line in checkpoints.damage(path, reader=r, readers=readers)]
    assert len(lines) == 1 and said in lines[0] and str(path) in lines[0]


def test_a_trainer_s_state_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.json is missing"):
        checkpoints.read_trainer_state(tmp_path)
    for text in ("[]", '{"batch": 1}', (make(tmp_path, 1) / "trainer.json").read_text().replace("64", "-1")):
        (tmp_path / "trainer.json").write_text(text)
        with pytest.raises(UserError, match="must hold exactly the counts batch, "):
            checkpoints.read_trainer_state(tmp_path)
    (tmp_path / "trainer.json").write_text("{")
    with pytest.raises(UserError, match=r"trainer\.json is no JSON"):
        checkpoints.read_trainer_state(tmp_path)


def test_a_name_is_freed(tmp_path: Path) -> None:
    assert checkpoints.set_aside(make(tmp_path, 4)).name == "step_00000004.unused"
    assert checkpoints.set_aside(make(tmp_path, 4)).name == "step_00000004.unused1"
    assert names(tmp_path) == []


def settle(work: Background) -> str:
    while work.look() == "running":
        time.sleep(0.01)
    return work.look()


def test_work_beside_sees_memory_as_it_was(tmp_path: Path) -> None:
    values = [1, 2, 3]

    def write() -> None:
        time.sleep(0.3)
        (tmp_path / "values").write_text(str(values))

    work = Background(write)
    values[:] = []
    assert work.look() == "running"
    assert settle(work) == "done" and work.error == "" and (tmp_path / "values").read_text() == "[1, 2, 3]"


def test_copies_stay_and_memory_that_is_withheld_is_not_there(tmp_path: Path) -> None:
    state = torch.arange(2**20, dtype=torch.float32)
    views = [state[5:1000].view(5, 199), state.view(2, -1)[1], torch.tensor([7], dtype=torch.int16)]
    memory = SharedMemory()
    for offset in (0.0, 1.0):  # the memory is used again
        state.add_(offset)
        copies = memory.copy(views)
        expected = [view.clone() for view in views]
        work = Background(lambda copies=copies: torch.save(copies, tmp_path / "copies"), withheld=views)
        state.mul_(2)
        assert settle(work) == "done", work.error
        assert all(torch.equal(a, b) for a, b in zip(torch.load(tmp_path / "copies"), expected, strict=True))

    def touch() -> None:
        faulthandler.disable()  # pytest's
        torch.save(state.clone(), tmp_path / "state")

    work = Background(touch, withheld=views)
    assert settle(work) == "failed" and work.error == "its process was ended by SIGSEGV"
    assert settle(Background(touch)) == "done"  # given back


def test_work_that_fails_says_why(tmp_path: Path) -> None:
    work = Background(lambda: (tmp_path / "missing" / "file").touch())
    assert settle(work) == "failed" and "FileNotFoundError: [Errno 2] No such file" in work.error
    work = Background(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert settle(work) == "failed" and work.error == "its process was ended by SIGKILL"


def test_work_takes_no_signals_and_can_be_stopped() -> None:
    work = Background(lambda: time.sleep(60))
    time.sleep(0.2)
    os.kill(work._pid, signal.SIGTERM)
    os.kill(work._pid, signal.SIGUSR1)
    time.sleep(0.2)
    assert work.look() == "running"
    work.stop()
    assert work.look() == "failed"


def test_work_ends_with_its_parent(tmp_path: Path) -> None:
    def parent() -> None:
        work = Background(lambda: time.sleep(60))
        (tmp_path / "pid").write_text(str(work._pid))
        time.sleep(0.2)

    assert settle(Background(parent)) == "done"
    deadline = time.monotonic() + 10
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
