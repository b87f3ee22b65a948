"""What the loss head costs in a training step, with the native operations and with their definition, on this device.

One rank learns from fixed rollout batches of the quick start's shape (examples/quickstart/gspo.toml: prompts of 8
tokens, responses of 8 or so, clip 0.03 / 0.04): old log-probabilities, then 4 optimizer steps; once with its vocabulary
of 100 symbols, and once with one of 32,768. Implementations take turns. The loss head is the output layer with its
log-probabilities, the policy loss and the means over sequences, forward and backward; its share is by torch's profiler,
in batches that are not timed.

    python tools/benchmark_loss_head.py [--batches 7] [--vocabularies 100,32768] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from gspo_megatron import ops
from gspo_megatron.algorithms import base, total_loss
from gspo_megatron.config import KernelsConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from gspo_megatron.config_io import load_config
from gspo_megatron.device import current_device
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.job import Job
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.policy import model as model_module
from gspo_megatron.policy.runtime import initialize
from gspo_megatron.tokenizer import Tokenizer
from gspo_megatron.trainer import Trainer
from gspo_megatron.types import Sequence

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart"
KERNELS = {
    "reference": KernelsConfig(implementation="reference", skip_zero_gradients=False),
    "native": KernelsConfig(),
}
PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8
PROFILED = 3  # batches
HEAD = "loss head"
# What autograd calls the backward passes of the operations.
BACKWARD = ("_LinearLogprobsBackward", "_SequencePolicyLossBackward", "GeneratedBackwardFor_gspo_megatron")


@dataclass
class Result:
    """Of one implementation and vocabulary."""

    seconds: list[float] = field(default_factory=list)
    head_s: list[float] = field(default_factory=list)  # of the profiled batches
    head_shares: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def rollout_batch(config: TrainConfig, vocabulary: int, number: int) -> list[Sequence]:
    """Random tokens in the shape of one rollout batch; a quarter of the groups has equal rewards."""
    generator = torch.Generator().manual_seed(number)
    sequences = []
    for prompt in range(config.rollout.prompts_per_batch):
        advantages = torch.randn(config.rollout.samples_per_prompt, generator=generator) * (prompt % 4 > 0)
        for advantage in advantages:
            response = RESPONSE_TOKENS + int(torch.randint(-4, 5, (), generator=generator))
            token_ids = torch.randint(2, vocabulary, (PROMPT_TOKENS + response,), generator=generator)
            mask = torch.arange(len(token_ids)) >= PROMPT_TOKENS
            sequences.append(Sequence(len(sequences), token_ids, mask, torch.zeros(len(token_ids)), advantage))
    return sequences


def make_trainer(vocabulary: int, kernels: KernelsConfig, groups: ProcessGroups, folder: Path) -> Trainer:
    """The quick start's model with another vocabulary, random weights, the given kernels, on one rank."""
    fields = json.loads((QUICKSTART / "model/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": vocabulary}))
    quickstart = load_config(TrainConfig, QUICKSTART / "gspo.toml")
    config = replace(
        quickstart,
        run=RunConfig(folder="unused"),
        model=ModelConfig(path=str(folder), init="random"),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        kernels=kernels,
    )
    tokenizer = Tokenizer.load(str(QUICKSTART / "model"))
    return Trainer(config, Job(config, groups, tokenizer, None, None, None, current_device()))  # type: ignore[arg-type]


def learn(trainer: Trainer, sequences: list[Sequence]) -> float:
    """Old log-probabilities and optimizer steps of one rollout batch; the loss of its last step."""
    _, results = trainer.learn(sequences, 2)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(sum(micro.sums[0] for micro in results[-1].reports))


@contextmanager
def named_operations() -> Iterator[None]:
    """The calls of the operations under the name HEAD in a profile."""
    places = [(model_module.ops, "linear_logprobs"), (base, "sequence_policy_loss"), (total_loss, "sequence_mean")]
    originals = [getattr(place, name) for place, name in places]

    def named(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with record_function(HEAD):
                return original(*arguments, **keywords)

        return call

    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, named(original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def head_time(trainer: Trainer, sequences: list[Sequence]) -> tuple[float, float]:
    """Seconds of the loss head in one rollout batch, and its share of the batch's time."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with named_operations(), profile(activities=activities) as recording, record_function("everything"):
        learn(trainer, sequences)
    times = {e.key: e.device_time_total if cuda else e.cpu_time_total for e in recording.key_averages()}
    backward = sum(t for key, t in times.items() if key.startswith(BACKWARD))
    return (times[HEAD] + backward) / 1e6, (times[HEAD] + backward) / times["everything"]


def measure(vocabulary: int, batches: int, groups: ProcessGroups) -> dict[str, Result]:
    """Every implementation on the same batches, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(vocabulary, k, groups, Path(folder)) for name, k in KERNELS.items()}
    results = {name: Result() for name in KERNELS}
    config = next(iter(trainers.values())).config
    for number in range(1 + batches + PROFILED):
        sequences = rollout_batch(config, vocabulary, number)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            if number > batches:
                head_s, share = head_time(trainer, sequences)
                results[name].head_s.append(head_s)
                results[name].head_shares.append(share)
                continue
            results[name].losses.append(learn(trainer, sequences))
            if number > 0:  # the first warms up
                results[name].seconds.append(time.perf_counter() - start)
    return results


def report(results: dict[int, dict[str, Result]], batches: int) -> str:
    """The tables, in Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    lines = [
        f"One rank, hidden size 128, 2 layers, 8 experts, float32, {device}; 256 sequences of 16 tokens or so, 4 "
        f"optimizer steps a rollout batch; medians of {batches} batches, the implementations taking turns. reference: "
        "the definition in plain torch, every token's backward pass.",
        "",
        "| vocabulary | kernels | old log-probs and training, s a batch | of reference's | loss head, ms a batch | "
        "its share | largest difference of the loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for vocabulary, by_name in results.items():
        base_seconds = statistics.median(by_name["reference"].seconds)
        for name, result in by_name.items():
            seconds = statistics.median(result.seconds)
            pairs = zip(result.losses, by_name["reference"].losses, strict=True)
            difference = "–" if name == "reference" else f"{max(abs(a - b) for a, b in pairs):.1e}"
            head_ms, share = 1e3 * statistics.median(result.head_s), statistics.median(result.head_shares)
            cells = [f"{vocabulary:,}", name, f"{seconds:.3f}", f"{seconds / base_seconds:.2f}"]
            lines.append(f"| {' | '.join([*cells, f'{head_ms:.1f}', f'{share:.1%}', difference])} |")
    return "\n".join(lines) + "\n"


def main(arguments: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=7, help="timed rollout batches of each implementation")
    parser.add_argument("--vocabularies", default="100,32768", help="sizes, separated by commas")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    ops.check_device(current_device())
    quiet_libraries()
    with single_rank_environment():
        groups = initialize(ParallelConfig().layout(), seed=0, timeout_s=600)
        vocabularies = [int(size) for size in options.vocabularies.split(",")]
        text = report({size: measure(size, options.batches, groups) for size in vocabularies}, options.batches)
        dist.destroy_process_group()
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
