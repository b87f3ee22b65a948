"""How long saving a checkpoint keeps the training loop waiting, beside training and instead of it.

One rank with a MoE model of random weights in float32 trains on small random batches and saves through the trainer's
own Checkpointer: in turns without saving, saving synchronously, and saving while training goes on. The loop waits for
the call between two batches. Beside it the process forks, and memory that training overwrites while the checkpoint is
being written is copied first: what batches cost more for that is given in processor time of the trainer, which the
writer on another core has no part in.

    python tools/benchmark_checkpoint.py [--repetitions 7] [--experts 24] [--folder DIR] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron import checkpoints
from gspo_megatron.checkpointer import Checkpointer
from gspo_megatron.checkpoints import TrainerState
from gspo_megatron.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.device import current_device
from gspo_megatron.job import Job
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.policy.runtime import initialize
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Sequence

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart"
SHAPE = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_hidden_layers": 3}
TARGET = 0.25


@dataclass
class Result:
    """Seconds, one of each a repetition."""

    batch: list[float] = field(default_factory=list)  # without saving
    synchronous: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)  # of the asynchronous save's call
    copying: list[float] = field(default_factory=list)  # processor time that the batches beside it take more, in all
    written: list[float] = field(default_factory=list)  # until the asynchronous checkpoint is complete
    state_bytes: int = 0


def make_trainer(folder: Path, experts: int) -> Trainer:
    """A policy without engines, whose checkpoints go to folder/run."""
    fields = json.loads((QUICKSTART / "model/config.json").read_text()) | SHAPE | {"num_experts": experts}
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(fields))
    config = replace(
        load_config(TrainConfig, QUICKSTART / "gspo.toml"),
        run=RunConfig(folder=str(folder / "run")),
        model=ModelConfig(path=str(folder / "model"), init="random"),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
    )
    groups = initialize(config.parallel.layout(), seed=0, timeout_s=600)
    tokenizer = Tokenizer.load(str(QUICKSTART / "model"))
    return Trainer(config, Job(config, groups, tokenizer, None, None, None, current_device()))  # type: ignore[arg-type]


def make_checkpointer(trainer: Trainer, *, is_async: bool) -> Checkpointer:
    """Saves at even batches."""
    settings = CheckpointConfig(every=2, keep_last=1, async_save=is_async)
    return Checkpointer(replace(trainer.job, config=replace(trainer.config, checkpoint=settings)), trainer.policy, None)


def state(batch: int, counts: dict[str, int]) -> TrainerState:
    return TrainerState(batch, batch, 0, 0, 0, **counts)


def train(trainer: Trainer, number: int) -> float:
    """Seconds of the processor for one batch of 16 random sequences in four optimizer steps."""
    generator = torch.Generator().manual_seed(number)
    sequences = []
    for index in range(16):
        tokens = torch.randint(2, 100, (16,), generator=generator)
        advantage = torch.randn((), generator=generator)
        sequences.append(Sequence(index, tokens, torch.arange(16) >= 8, torch.zeros(16), advantage))
    start = time.process_time()
    trainer.learn(sequences, 2)
    return time.process_time() - start


def measure(trainer: Trainer, repetitions: int) -> Result:
    """Each way of saving once a repetition."""
    result = Result()
    synchronous, beside = (make_checkpointer(trainer, is_async=flag) for flag in (False, True))
    run = Path(trainer.config.run.folder)
    train(trainer, 0)
    for repetition in range(1 + repetitions):  # the first warms up
        batch = 4 * repetition + 2
        alone = [train(trainer, number) for number in range(3)]
        start = time.perf_counter()
        synchronous.boundary(batch, state)
        synchronous_s = time.perf_counter() - start
        assert checkpoints.batch_of(checkpoints.complete(run)[0]) == batch

        batch += 2
        begun = time.perf_counter()
        beside.boundary(batch, state)
        stall = time.perf_counter() - begun
        busy = []
        while not (run / checkpoints.FOLDER / checkpoints.name_of(batch)).exists():
            busy.append(train(trainer, len(busy)))
            start = time.perf_counter()
            beside.boundary(batch + 1, state)
            stall += time.perf_counter() - start
        written = time.perf_counter() - begun
        beside._finish()
        assert checkpoints.damage(checkpoints.complete(run)[0]) == []
        if repetition:
            usual = statistics.median(alone)
            result.batch.append(usual)
            result.synchronous.append(synchronous_s)
            result.stall.append(stall)
            result.copying.append(sum(busy) - len(busy) * usual)
            result.written.append(written)
    newest = checkpoints.complete(run)[0]
    result.state_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return result


def report(result: Result) -> str:
    """The table, in Markdown."""
    base = statistics.median(result.synchronous)
    ratio = statistics.median(a / b for a, b in zip(result.stall, result.synchronous, strict=True))
    both = statistics.median(
        (a + c) / b for a, c, b in zip(result.stall, result.copying, result.synchronous, strict=True)
    )
    rows = {
        "processor time of a batch without saving": statistics.median(result.batch) / base,
        "synchronous save": 1.0,
        "asynchronous save: the loop waits": ratio,
        "… and with the processor time that batches beside it take more": both,
        "asynchronous save: complete after": statistics.median(result.written) / base,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    lines = [
        f"One rank, {device}, {os.cpu_count()} cores; a checkpoint of {result.state_bytes / 1e9:.2f} GB in float32, "
        f"every file synced and hashed; medians of {len(result.stall)} repetitions in turns, as shares of a "
        f"synchronous save's time in the same repetition. Target: the loop waits for at most {TARGET:.0%}.",
        "",
        "| | of a synchronous save |",
        "|---|---|",
        *(f"| {name} | {value:.1%} |" for name, value in rows.items()),
        "",
        f"The loop waits for {min(a / b for a, b in zip(result.stall, result.synchronous, strict=True)):.1%} to "
        f"{max(a / b for a, b in zip(result.stall, result.synchronous, strict=True)):.1%}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="timed saves of each kind")
    parser.add_argument("--experts", type=int, default=24, help="experts a layer; 24 make 1.4 GB of state")
    parser.add_argument("--folder", type=Path, help="where to save to; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    folder = Path(tempfile.mkdtemp(prefix="gspo_checkpoint_", dir=options.folder))
    try:
        with single_rank_environment():
            text = report(measure(make_trainer(folder, options.experts), options.repetitions))
            dist.destroy_process_group()
    finally:
        shutil.rmtree(folder)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
