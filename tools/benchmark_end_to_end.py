#!/usr/bin/env python
"""GSPO of a tiny MoE on a CPU, from prompts to new weights: ours beside TRL's GRPOTrainer, taking turns.

    make setup-peers
    .venv/bin/python tools/benchmark_end_to_end.py [--lengths 32,128] [--processes 1,2] [--batches 7]
                                                   [--sides ours,trl] [--output benchmarks/results/end_to_end_cpu]

Both sides start from the same folder of random weights and take the same prompts of reasoning_gym in the same order,
with its own score as reward: groups of 8, 4 optimizer steps a rollout batch on old log-probabilities recomputed
before the first, GSPO's loss and clip, no KL, AdamW, float32, one thread a process. For each length and number of
processes both sides are started and then work through a rollout batch in turns, while the other waits; the clock of a
turn runs until the last rank has answered. The first batch warms up and is left out. On a machine that others use
too, compare CPU seconds.

Writes OUTPUT.json (everything) and OUTPUT.md (the tables), and prints the latter.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from end_to_end.job import Batch, Job
from end_to_end.report import Machine, Measurement, Turn, markdown, summary

from gspo_megatron import config as c
from gspo_megatron.config_io import dump_config
from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_USER_ERROR

TOOLS = Path(__file__).parent
PEERS_PYTHON = TOOLS.parent / ".venv-peers/bin/python"
SIDES = ("ours", "trl")
TURN_TIMEOUT_S = 600.0
SEED = 1


@dataclass(frozen=True)
class Size:
    """A model and a rollout batch."""

    hf_config: dict[str, int]
    prompts_per_batch: int
    samples_per_prompt: int
    mini_batches: int


SIZES = {
    "job": Size(
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        prompts_per_batch=16,
        samples_per_prompt=8,
        mini_batches=4,
    ),
    # To see that everything works.
    "tiny": Size(
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        prompts_per_batch=4,
        samples_per_prompt=4,
        mini_batches=2,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# What both sides start from
# ---------------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, size: Size) -> int:
    """A Qwen3-MoE with random weights, 100 symbols and the quickstart's character tokenizer. Returns its parameters."""
    import torch
    from make_char_tokenizer import write as write_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **size.hf_config,
            vocab_size=100,
            intermediate_size=2 * size.hf_config["hidden_size"],  # of dense layers: there are none
            max_position_embeddings=1024,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            # With one, transformers starts its embedding at 0 and leaves it out of training. Random weights sample that
            # token too, and where RMSNorm divides by next to nothing its gradient would outweigh all others.
            pad_token_id=None,
            dtype="float32",
        )
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)  # after the model, whose generation_config.json has no sampling settings of its own
    return sum(p.numel() for p in model.parameters())


def make_job(folder: Path, size: Size, options: argparse.Namespace, *, length: int, processes: int) -> Job:
    """The job of one pair of runs."""
    return Job(
        model=str(folder / "model"),
        prompts=str(folder / "prompts.jsonl"),
        run=str(folder / f"length{length}_processes{processes}"),
        max_length=length,
        prompts_per_batch=size.prompts_per_batch,
        samples_per_prompt=size.samples_per_prompt,
        mini_batches=size.mini_batches,
        batches=1 + options.batches,
        processes=processes,
        learning_rate=options.learning_rate,
        clip_low=3e-4,
        clip_high=4e-4,
        dataset="spell_backward",
        dataset_params={"min_word_len": 3, "max_word_len": 8},
        prompt_pattern=r": (?P<word>\w+)$",
        prompt_template="{word}>",
        seed=SEED,
    )


def train_config(job: Job) -> c.TrainConfig:
    """Our names for the job: what `python -m gspo_megatron train` would be given."""
    return c.TrainConfig(
        run=c.RunConfig(folder=str(Path(job.run) / "ours"), seed=job.seed),
        model=c.ModelConfig(path=job.model, dtype="float32"),
        parallel=c.ParallelConfig(data=job.processes),
        task=c.TaskConfig(
            name="reasoning_gym",
            dataset=job.dataset,
            params=dict(job.dataset_params),
            prompt_pattern=job.prompt_pattern,
            prompt_template=job.prompt_template,
            lowercase=True,
        ),
        algorithm=c.AlgorithmConfig(
            name="gspo", clip_low=job.clip_low, clip_high=job.clip_high, mini_batches=job.mini_batches
        ),
        rollout=c.RolloutConfig(
            prompts_per_batch=job.prompts_per_batch,
            samples_per_prompt=job.samples_per_prompt,
            max_response_tokens=job.max_length,
        ),
        # A mini-batch is one pass, as it is TRL's: prompts have at most 9 tokens.
        data=c.DataConfig(token_budget=job.completions // job.mini_batches * (job.max_length + 16)),
        optimizer=c.OptimizerConfig(lr=job.learning_rate, clip_grad=1.0),
        train=c.TrainLoopConfig(rollout_batches=job.batches),
    )


def write_prompts(job: Job) -> None:
    """The prompts of all rollout batches, in our task's order."""
    from gspo_megatron.tasks import build
    from gspo_megatron.tokenizer import Tokenizer

    config = train_config(job)
    task = build(config.task, Tokenizer.load(job.model), seed=job.seed)
    prompts = task.prompts("train", 0, job.batches * job.prompts_per_batch)
    rows = [json.dumps({"prompt": p.text, "entry": json.dumps(p.reference)}) for p in prompts]
    Path(job.prompts).write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


class Side:
    """The ranks of one side, started and waiting for their turn."""

    def __init__(self, name: str, python: Path, job: Job, stack: contextlib.ExitStack) -> None:
        self.name, self.log = name, Path(job.run) / f"{name}.log"
        self.ranks: list[subprocess.Popen[str]] = []
        self.answers: list[Any] = []
        job_file = Path(job.run) / "job.json"
        port = free_port()
        log = stack.enter_context(self.log.open("w"))
        for rank in range(job.processes):
            read, write = os.pipe()
            process = subprocess.Popen(
                [str(python), "-m", f"end_to_end.{name}", str(job_file)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=rank_environment(name, rank, job.processes, port) | {"END_TO_END_ANSWERS": str(write)},
                text=True,
            )
            os.close(write)
            stack.callback(end, process)
            self.ranks.append(process)
            self.answers.append(stack.enter_context(os.fdopen(read)))
        self.facts: dict[str, Any] = self._answers()[0]

    def turn(self) -> Turn:
        """One rollout batch; the clock stops with the last rank's answer."""
        start = time.perf_counter()
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = self._answers()
        return Turn(time.perf_counter() - start, [Batch(**answer) for answer in answers])

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(rank, file) for rank, file in enumerate(self.answers)]

    def _answer(self, rank: int, file: Any) -> dict[str, Any]:
        readable, _, _ = select.select([file], [], [], TURN_TIMEOUT_S)
        line = file.readline() if readable else ""
        if not line:
            what = "ended" if readable else f"was silent for {TURN_TIMEOUT_S:g} s"
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise RuntimeError(f"rank {rank} of {self.name} {what}; the end of its output:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def rank_environment(side: str, rank: int, processes: int, port: int) -> dict[str, str]:
    """torchrun's, with one thread a process, no GPU and no network; TRL alone takes none of torchrun's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(TOOLS)}
    if side == "trl" and processes == 1:
        return environment
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end(process: subprocess.Popen[str]) -> None:
    """Give a rank that has answered all batches a moment to leave, then end it."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure(job: Job, pythons: dict[str, Path]) -> list[Measurement]:
    """All batches of one length and number of processes, in turns: one Measurement a side."""
    folder = Path(job.run)
    (folder / "ours").mkdir(parents=True)
    (folder / "ours.toml").write_text(dump_config(train_config(job)), encoding="utf-8")
    job.save(folder / "job.json")
    with contextlib.ExitStack() as stack:
        sides = [Side(name, python, job, stack) for name, python in pythons.items()]
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        for number in range(job.batches):
            for side in sides:
                turns[side.name].append(side.turn())
            check_alike(job, number, {name: done[-1] for name, done in turns.items()})
            progress(job, number, {name: done[-1].seconds for name, done in turns.items()})
    return [Measurement(s.name, job.max_length, job.processes, s.facts, turns[s.name][1:]) for s in sides]


def check_alike(job: Job, number: int, turns: dict[str, Turn]) -> None:
    """Refuse a comparison of different work."""
    prompts = {}
    for name, turn in turns.items():
        work = {
            "completions": sum(b.completions for b in turn.ranks),
            "sequences with old log-probabilities": sum(b.old_logprob_sequences for b in turn.ranks),
            "optimizer steps": turn.ranks[0].optimizer_steps,
        }
        due = dict(zip(work, (job.completions, job.completions, job.mini_batches), strict=True))
        if work != due:
            raise RuntimeError(f"batch {number} of {name} did {work}; due were {due}")
        prompts[name] = sorted(tuple(ids) for b in turn.ranks for ids in b.prompts)
    if any(other != prompts[next(iter(prompts))] for other in prompts.values()):
        raise RuntimeError(f"batch {number}: the sides took different prompts: {prompts}")


def progress(job: Job, number: int, seconds: dict[str, float]) -> None:
    """One line on stderr."""
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    what = "warm-up" if number == 0 else f"batch {number} of {job.batches - 1}"
    print(f"length {job.max_length}, processes {job.processes}, {what}: {times}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def numbers(name: str, text: str) -> list[int]:
    """Positive integers separated by commas."""
    values = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(values) < 1:
        raise UserError(f"--{name} {text!r} must be positive integers separated by commas, e.g. 32,128")
    return values


def find_pythons(options: argparse.Namespace) -> dict[str, Path]:
    """The interpreter of each side that is to run."""
    names = options.sides.split(",")
    if unknown := [name for name in names if name not in SIDES]:
        raise UserError(f"--sides {options.sides!r}: {unknown[0]!r} is none of {', '.join(SIDES)}")
    if "trl" in names and not options.peers_python.is_file():
        raise UserError(
            f"--peers-python {options.peers_python}: no such file; run `make setup-peers`, which makes the virtual "
            "environment that TRL runs in, or measure our side alone with --sides ours"
        )
    return {name: Path(sys.executable) if name == "ours" else options.peers_python for name in names}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="job", help="default: %(default)s")
    parser.add_argument("--lengths", default="32,128", help="longest responses, in tokens; default: %(default)s")
    parser.add_argument("--processes", default="1,2", help="numbers of processes; default: %(default)s")
    parser.add_argument("--batches", type=int, default=7, help="timed rollout batches; default: %(default)s")
    parser.add_argument("--sides", default=",".join(SIDES), help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="default: %(default)s")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="of TRL; default: .venv-peers'")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    if options.batches < 1:
        raise UserError(f"--batches {options.batches} must be at least 1")
    options.lengths = numbers("lengths", options.lengths)
    options.processes = numbers("processes", options.processes)
    for processes in options.processes:
        # TRL generates whole groups on each rank, and cuts a mini-batch evenly.
        if SIZES[options.size].prompts_per_batch // SIZES[options.size].mini_batches % processes:
            raise UserError(f"--processes {processes} does not divide the prompts of a mini-batch; use 1 or 2")
    return options


@contextlib.contextmanager
def prepared(options: argparse.Namespace) -> Iterator[tuple[list[Job], int]]:
    """The jobs, over a model and prompts that exist as long as the context; and the model's parameters."""
    with tempfile.TemporaryDirectory(prefix="end_to_end_") as name:
        folder, size = Path(name), SIZES[options.size]
        jobs = [
            make_job(folder, size, options, length=length, processes=processes)
            for length in options.lengths
            for processes in options.processes
        ]
        parameters = write_model(folder / "model", size)
        write_prompts(jobs[0])
        yield jobs, parameters


def main() -> int:
    options = parse_arguments()
    pythons = find_pythons(options)
    machine = Machine.here()
    with prepared(options) as (jobs, parameters):
        measurements = [m for job in jobs for m in measure(job, pythons)]
    command = "tools/benchmark_end_to_end.py " + " ".join(sys.argv[1:])
    report = {
        "command": command.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": asdict(machine),
        "model": {**SIZES[options.size].hf_config, "vocab_size": 100, "parameters": parameters},
        "job": {name: value for name, value in asdict(jobs[0]).items() if name not in LOCAL_FIELDS},
        "measurements": [summary(m) for m in measurements],
    }
    text = markdown(report, measurements)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return EXIT_DONE


LOCAL_FIELDS = ("model", "prompts", "run", "max_length", "processes")  # of a Job: paths, and what the table says


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
