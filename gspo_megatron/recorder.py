"""Rank 0's account of a run: metrics.jsonl, samples.jsonl, the progress display. Collective where it gathers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gspo_megatron import algorithms, step_metrics
from gspo_megatron.config import TrainConfig
from gspo_megatron.evaluate import EvalResult
from gspo_megatron.experience import Experience
from gspo_megatron.job import Job
from gspo_megatron.metrics import METRICS_FILE, MetricsWriter
from gspo_megatron.policy.policy import StepResult
from gspo_megatron.progress import Progress
from gspo_megatron.stability.routing import route_metrics
from gspo_megatron.stability.run_data import read_metrics
from gspo_megatron.stability.watchdog import Facts, Watchdog
from gspo_megatron.types import Rollout, StepBatch
from gspo_megatron.weight_sync import SyncReport


@dataclass(frozen=True)
class BatchOutcome:
    """What one rollout batch left behind on one rank."""

    policy_version: int  # of the weights that generated it
    experience: Experience
    mini_batches: list[StepBatch]
    results: list[StepResult]
    sync: SyncReport  # of the weights after it
    times: dict[str, float | None]  # seconds, by metric name
    route_counts: Tensor | None = None  # over all ranks, see stability/routing.py; None: not measured


class Recorder:
    """Writes one row of metrics per rollout batch."""

    def __init__(self, job: Job, label: str, total: int, unit: str = "batch", done: int | None = None) -> None:
        """`done`: of so many the records are there already; None: of nothing, not even of the start."""
        self.job, self.done = job, done
        self.is_writer = job.groups.rank == 0
        self.display = Progress(total, label, enabled=self.is_writer, unit=unit, completed=done or 0)
        self.writer: MetricsWriter | None = None
        self._errors_said: set[str] = set()
        self._watchdog: Watchdog | None = None  # sees rows at rank 0; None: this is no run of those that it knows
        if isinstance(job.config, TrainConfig):
            resolved = dataclasses.replace(job.config, algorithm=algorithms.resolve(job.config.algorithm))
            self._watchdog = Watchdog(Facts.of(dataclasses.asdict(resolved)))

    @contextlib.contextmanager
    def open(self) -> Iterator[Recorder]:
        """Open the run folder's files, and close them at the end."""
        config = self.job.config
        with contextlib.ExitStack() as stack:
            if self.is_writer:
                self.writer = stack.enter_context(
                    MetricsWriter(
                        config.run.folder,
                        tensorboard=config.log.tensorboard,
                        wandb_project=config.log.wandb_project,
                        config=dataclasses.asdict(config),
                        first_step=None if self.done is None else self.done + 1,
                    )
                )
                self._recall()
            stack.enter_context(self.display)
            yield self

    def _recall(self) -> None:
        """Take up the rows of earlier starts, so that the watchdog finds what it would without a break."""
        path = Path(self.job.config.run.folder) / METRICS_FILE
        if self._watchdog is not None and self.done is not None and path.stat().st_size > 0:
            rows, _ = read_metrics(path)
            for row in rows:
                self._watchdog.see(row)

    def positions(self) -> tuple[int, int]:
        """Where metrics.jsonl and samples.jsonl end, at rank 0; (0, 0) elsewhere."""
        return self.writer.positions() if self.writer is not None else (0, 0)

    def batch(self, step: int, outcome: BatchOutcome, evaluation: EvalResult | None) -> None:
        """Gather one rollout batch's figures and write them."""
        micro_batches = [m for batch in outcome.mini_batches for m in batch.micro_batches]
        records = self.job.gather(
            step_metrics.record(
                # Every tensor- and context-parallel rank of the last stage holds the same reports: one of them counts.
                [result.reports if self.job.groups.reports_loss else [] for result in outcome.results],
                outcome.experience,
                padding=(
                    sum(m.num_padding_tokens for m in micro_batches),
                    sum(m.num_tokens for m in micro_batches) * self.job.groups.layout.context,
                ),
                engine_bytes=outcome.sync.num_bytes,
            )
        )
        samples = self.job.gather(self._samples(outcome))
        if records is None or samples is None:
            return
        row: dict[str, Any] = {"policy_version": outcome.policy_version, **step_metrics.summarize(records)}
        tokens = row.pop("response_tokens")
        row |= outcome.times
        rollout_s = outcome.times["time_rollout_s"]
        row["rollout_tokens_per_s"] = tokens / rollout_s if rollout_s else None
        if outcome.times.get("time_logprobs_saved_s") is not None:
            row = step_metrics.without_recompute(row)
        row |= step_metrics.of_steps(outcome.results)
        if outcome.route_counts is not None:
            row |= route_metrics(outcome.route_counts)
        if outcome.sync.is_probed:
            row["sync_probe_max_abs"] = outcome.sync.probe_max_abs
        self._report_failures(step, records)
        for number, result in enumerate(outcome.results, start=1):
            if result.is_skipped:
                self.display.note(
                    f"watchdog, batch {step}: the optimizer step of mini-batch {number} was left out, its gradient "
                    f"norm is {result.grad_norm:.3g}"
                )
        self.write(step, row, evaluation)
        assert self.writer is not None
        merged = [sample for part in samples for sample in part]
        chosen = choose([r["reward"] for _, r in merged], [n for n, _ in merged], self.job.config.log.samples_per_batch)
        self.writer.write_samples(step, [merged[i][1] for i in chosen])

    def _report_failures(self, step: int, records: Sequence[step_metrics.RankRecord]) -> None:
        """Say once for each reason that rewards failed; how many there were is in the metrics."""
        for record in records:
            if record.first_error is not None and record.first_error not in self._errors_said:
                self._errors_said.add(record.first_error)
                failed = sum(r.failed + r.timed_out for r in records)
                self.display.note(
                    f"batch {step}: {failed} rollouts have no reward; the scorer said: {record.first_error}"
                )

    def write(self, step: int, row: dict[str, Any], evaluation: EvalResult | None) -> None:
        """One row of metrics.jsonl, at rank 0; the evaluation is that of the weights after the step."""
        if self.writer is None:
            return
        assert self.job.engine is not None  # rank 0 is a head
        row = {"step": step, "engine": self.job.engine.name, **row}
        if evaluation is not None:
            row |= {
                "eval_reward_mean": evaluation.mean,
                "eval_reward_ci95": evaluation.ci95,
                "eval_samples_per_prompt": evaluation.num_samples,
                "pass_at_k": evaluation.pass_at[max(evaluation.pass_at)],
            }
            self.display.note(f"after step {step}: {evaluation}")
        self.writer.write(row)
        if step > 0:
            self._watch(row)
            self.display.update(row)

    def _watch(self, row: dict[str, Any]) -> None:
        """Have the watchdog look at the newest row; say what was not said of the one before."""
        if self._watchdog is not None:
            for finding in self._watchdog.see(row):
                self.display.note(f"watchdog, batch {finding.step}: {finding.message}")

    def alarms(self) -> list[str]:
        """What the watchdog stops the run for after the last row; the same on every rank. Collective, if it may."""
        config = self.job.config
        if not isinstance(config, TrainConfig) or config.watchdog.action != "stop":
            return []
        assert self._watchdog is not None
        found = self.job.all_gather([finding.message for finding in self._watchdog.findings])
        return [message for part in found for message in part]

    def skip_above(self) -> float | None:
        """The gradient norm above which the next batch's optimizer steps are left out; None: no step is. The same on
        every rank. Collective, if it may."""
        config = self.job.config
        if self._watchdog is None or not isinstance(config, TrainConfig) or config.watchdog.action != "skip":
            return None
        [limit] = self.job.all_gather(self._watchdog.spike_limit() if self.is_writer else None)
        return limit

    def _samples(self, outcome: BatchOutcome) -> list[tuple[int, dict[str, Any]]] | None:
        """(response length, row of samples.jsonl) of a few of this head's rollouts."""
        experience = outcome.experience
        if not experience.groups:
            return None
        flat = [
            (rollout, advantage, group.prompt.text)
            for group, advantages in zip(experience.groups, experience.advantages, strict=True)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        ]
        lengths = [int(rollout.response_mask.sum()) for rollout, _, _ in flat]
        chosen = choose([r.reward for r, _, _ in flat], lengths, self.job.config.log.samples_per_batch)
        return [(lengths[i], self._sample(*flat[i])) for i in chosen]

    def _sample(self, rollout: Rollout, advantage: float | None, prompt: str) -> dict[str, Any]:
        response = rollout.response_mask
        return {
            "prompt": prompt,
            "response": self.job.tokenizer.decode(rollout.token_ids[response].tolist()),
            "reward": rollout.reward,
            "finish_reason": rollout.finish_reason,
            "policy_version": int(rollout.policy_versions[response][0]),
            "advantage": advantage,
        }


def choose(rewards: Sequence[float | None], lengths: Sequence[int], most: int) -> list[int]:
    """Positions of the rollouts worth reading: the best, the worst, the longest, then the first ones."""
    if not lengths:
        return []
    everyone = range(len(lengths))
    scored = [i for i in everyone if rewards[i] is not None]
    telling = []
    if scored:
        telling = [max(scored, key=lambda i: rewards[i] or 0.0), min(scored, key=lambda i: rewards[i] or 0.0)]
    telling.append(max(everyone, key=lambda i: lengths[i]))
    return list(dict.fromkeys([*telling, *everyone]))[:most]
