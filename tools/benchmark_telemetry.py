"""What telemetry adds to a rollout batch's training, measured on one rank of this device.

A random Qwen3-MoE learns from a packed batch through the trainer's own loss: with what every batch observes
(`observed_loss`), with the loss alone, and as a batch that is measured (`telemetry.every`) besides. The three take
turns; medians are printed, and the share that `telemetry.every` makes of the last.

    python tools/benchmark_telemetry.py [--tokens 2048] [--batches 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
import torch.distributed as dist
from small_moe import MODEL, ragged_sequences

from gspo_megatron import algorithms, step_metrics
from gspo_megatron.algorithms import Mismatch, objective
from gspo_megatron.config import AlgorithmConfig, ModelConfig, OptimizerConfig, TelemetryConfig
from gspo_megatron.data.micro_batch import pack
from gspo_megatron.experience import Experience
from gspo_megatron.launch import single_rank_environment
from gspo_megatron.logs import quiet_libraries
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.policy import MegatronPolicy
from gspo_megatron.policy.runtime import initialize
from gspo_megatron.policy.step import LossFunction
from gspo_megatron.stability.routing import route_metrics
from gspo_megatron.types import Group, Prompt, Rollout, ScoreReport, Sequence, StepBatch

LONGEST = 256
MINI_BATCHES = 4
ALONE, OBSERVED, MEASURED = "loss alone", "observed, as every batch", "measured, as telemetry.every says"


def make_batches(tokens: int) -> tuple[list[StepBatch], Experience]:
    """MINI_BATCHES packed micro-batches of ragged sequences, `tokens` in each, and the rollouts they stand for."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches: list[StepBatch] = []
    everyone: list[Sequence] = []
    for _ in range(MINI_BATCHES):
        sequences = ragged_sequences(tokens, longest=LONGEST, generator=generator, first=len(everyone))
        everyone += sequences
        micro = pack(sequences, pad_token_id=0, device=device)
        tokens_here = sum(int(s.response_mask[1:].sum()) for s in sequences)
        batches.append(StepBatch([micro], num_global_sequences=len(sequences), num_global_tokens=tokens_here))
    groups = [
        Group(
            Prompt(s.index, "", [0], None),
            [Rollout(s.index, s.token_ids, s.response_mask, s.rollout_logprobs, s.token_ids.int(), "stop", 1.0)],
        )
        for s in everyone
    ]
    return batches, Experience(groups, everyone, [], ScoreReport(), 0)


def loss_alone(algorithm: algorithms.Algorithm, num_sequences: int) -> LossFunction:
    """The whole loss, of which nothing is noted."""

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor, micro: object) -> tuple[torch.Tensor, None]:
        result = objective(algorithm, logprobs, entropy, micro, num_sequences=num_sequences, mismatch=Mismatch())  # type: ignore[arg-type]
        return result.loss, None

    return loss


def ways(policy: MegatronPolicy, batches: list[StepBatch], experience: Experience) -> dict[str, Callable[[], object]]:
    """One rollout batch's training in each way, up to the row of metrics."""
    algorithm = algorithms.build(AlgorithmConfig(mini_batches=MINI_BATCHES))

    def alone() -> None:
        policy.fill_old_logprobs(batches)
        for batch in batches:
            policy.train_step(batch, loss_alone(algorithm, batch.num_global_sequences))

    def observed(*, measure: bool) -> dict[str, object]:
        policy.fill_old_logprobs(batches, record_routes=measure)
        results = [
            policy.train_step(
                batch,
                step_metrics.observed_loss(algorithm, Mismatch(), num_sequences=batch.num_global_sequences),
                measure_experts=measure,
            )
            for batch in batches
        ]
        routes = step_metrics.gather_routes(batches, policy, policy.groups) if measure else None
        record = step_metrics.record([r.reports for r in results], experience, padding=(0, 1), engine_bytes=0)
        changed = {} if routes is None else route_metrics(routes)
        return step_metrics.summarize([record]) | step_metrics.of_steps(results) | changed

    return {ALONE: alone, OBSERVED: lambda: observed(measure=False), MEASURED: lambda: observed(measure=True)}


def measure(takes: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, in which they take turns; a round before warms up. On a CPU seconds of this
    process, which others that run beside it don't lengthen."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    for number in range(rounds + 1):
        for name, take in takes.items():
            start = clock()
            take()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > 0:
                seconds[name].append(clock() - start)
    return seconds


def table(seconds: dict[str, list[float]], parameters: int, tokens: int) -> str:
    """The report, in Markdown. Ratios are taken within rounds, then their median."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    every = TelemetryConfig().every
    lines = [
        f"One rank, {parameters / 1e6:.1f} M parameters, float32, old log-probs and {MINI_BATCHES} mini-batches of "
        f"{tokens} tokens in sequences of {LONGEST // 4} to {LONGEST}, without rollouts; {device}.",
        "",
        "| training of a rollout batch | s | of the loss alone |",
        "|---|---|---|",
    ]
    ratios = {}
    for name, values in seconds.items():
        ratios[name] = statistics.median(x / alone for x, alone in zip(values, seconds[ALONE], strict=True))
        lines.append(f"| {name} | {statistics.median(values):.2f} | {ratios[name]:.3f} |")
    share = ratios[OBSERVED] + (ratios[MEASURED] - ratios[OBSERVED]) / every
    return "\n".join([*lines, f"| with telemetry.every = {every}, on average | | {share:.3f} |"]) + "\n"


def main(arguments: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="in a mini-batch")
    parser.add_argument("--batches", type=int, default=7, help="timed rollout batches of each way")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    with single_rank_environment(), tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        policy = MegatronPolicy(
            ModelConfig(path=folder, init="random"),
            OptimizerConfig(lr=1e-6),
            initialize(ParallelLayout(), seed=0, timeout_s=600),
            seed=0,
            total_steps=1000,
        )
        batches, experience = make_batches(options.tokens)
        seconds = measure(ways(policy, batches, experience), options.batches)
        report = table(seconds, sum(p.numel() for p in policy.weights.parameters), options.tokens)
        dist.destroy_process_group()
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report)


if __name__ == "__main__":
    main()
