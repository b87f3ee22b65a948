"""The training loop. `Trainer.step` is the algorithm; everything else is a room off it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from gspo_megatron import algorithms, run_folder
from gspo_megatron.checkpointer import Checkpointer
from gspo_megatron.checkpoints import TrainerState
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.exchange import distribute
from gspo_megatron.errors import CauseError
from gspo_megatron.evaluate import evaluate
from gspo_megatron.experience import collect
from gspo_megatron.failures import EXIT_DONE, EXIT_STOPPED
from gspo_megatron.job import Job, open_job
from gspo_megatron.old_logprobs import OldLogprobs
from gspo_megatron.policy.policy import MegatronPolicy, StepResult
from gspo_megatron.policy.step import LossFunction
from gspo_megatron.profiling import profiled
from gspo_megatron.recorder import BatchOutcome, Recorder
from gspo_megatron.step_metrics import gather_routes, observed_loss
from gspo_megatron.stop import StopSignals
from gspo_megatron.types import Sequence, StepBatch
from gspo_megatron.weight_sync import SyncReport, sync_weights


class Trainer:
    """Reinforcement learning of one policy. Every method runs on every rank."""

    def __init__(self, config: TrainConfig, job: Job) -> None:
        self.config, self.job = config, job
        self.algorithm = algorithms.build(config.algorithm, config.kernels.implementation)
        self.mismatch = algorithms.mismatch_of(config.algorithm)
        self.policy = MegatronPolicy(
            config.model,
            config.optimizer,
            job.groups,
            seed=config.run.seed,
            total_steps=config.train.rollout_batches * self.algorithm.mini_batches,
            temperature=config.rollout.temperature,
            keep_reference=self.algorithm.needs_reference,
            memory=config.memory,
            kernels=config.kernels,
        )
        self.old_logprobs = OldLogprobs(config.algorithm, self.algorithm, self.policy, job.groups)
        self.version = -1  # of the weights that the engines hold
        self.next_prompt = 0
        self.skip_above: float | None = None  # gradient norm of a step that is left out; None: none is
        self.times: dict[str, float | None] = {}

    def run(self, signals: StopSignals | None = None) -> int:
        """All rollout batches that are not done yet, evaluated before, between and after; then the weights are saved.

        Returns the exit code: 0, or 75 if a signal or the deadline stopped the run after it was saved.
        """
        total, every = self.config.train.rollout_batches, self.config.eval.every
        with closing(Checkpointer(self.job, self.policy, signals)) as checkpoints:
            done = self.resume(checkpoints.load())
            self.sync()
            with Recorder(self.job, "train", total, done=done).open() as recorder:
                if done is None:
                    recorder.write(0, {"policy_version": 0}, evaluate(self.job, self.resync))
                batch, state = done or 0, partial(self.state, recorder)
                stopped = checkpoints.boundary(batch, state)
                while batch < total and not stopped:
                    batch += 1
                    self.skip_above = recorder.skip_above()
                    with self.recorded(batch):
                        outcome = self.step(batch)
                    due = batch == total or (every > 0 and batch % every == 0)
                    recorder.batch(batch, outcome, evaluate(self.job, self.resync) if due else None)
                    if alarms := recorder.alarms():
                        checkpoints.save(batch, state)
                        raise CauseError(f"stopped by the watchdog after rollout batch {batch}: {'; '.join(alarms)}")
                    stopped = checkpoints.boundary(batch, state)
        if stopped:
            return EXIT_STOPPED
        self.save()
        return EXIT_DONE

    def step(self, batch: int) -> BatchOutcome:
        """One rollout batch: generate, score and weigh; learn; hand over the weights."""
        generated_by = self.version
        with self.timed("time_step_s"):
            with self.timed("time_rollout_s"):
                experience = collect(
                    self.job, self.algorithm, batch=batch, first_prompt=self.next_prompt, restore=self.resync
                )
                self.job.rest()
            mini_batches, results = self.learn(experience.sequences, batch)
            with self.timed("time_telemetry_s"):
                routes = self.measure_routes(mini_batches, batch)
            with self.timed("time_reshard_s"):
                sync = self.sync()
        self.next_prompt = experience.next_prompt
        return BatchOutcome(generated_by, experience, mini_batches, results, sync, dict(self.times), routes)

    def learn(self, sequences: list[Sequence], batch: int) -> tuple[list[StepBatch], list[StepResult]]:
        """Pack the replica's sequences once, recompute their log-probabilities, one optimizer step a mini-batch."""
        mini_batches = distribute(
            sequences,
            self.job.groups,
            mini_batches=self.algorithm.mini_batches,
            token_budget=self.config.data.token_budget,
            pad_token_id=self.job.tokenizer.pad_token_id,
            device=self.job.device,
            routes=self.policy.route_shape if self.config.returns_routes else None,
        )
        with self.timed("time_logprobs_s"):
            record = self.measures_routes(batch)
            self.times["time_logprobs_saved_s"] = self.old_logprobs.fill(mini_batches, batch, record_routes=record)
            if self.algorithm.needs_reference:
                self.policy.fill_reference_logprobs(mini_batches)
        with self.timed("time_train_s"):
            measure = self.config.telemetry.is_due(batch)
            results = [
                self.policy.train_step(
                    mini_batch,
                    self.loss(mini_batch),
                    measure_experts=measure,
                    skip_above=self.skip_above,
                    name=f"mini-batch {number} of rollout batch {batch}",
                )
                for number, mini_batch in enumerate(mini_batches, start=1)
            ]
        return mini_batches, results

    def measures_routes(self, batch: int) -> bool:
        """Whether the experts of the batch's tokens are compared before and after its updates."""
        return self.config.telemetry.is_due(batch) and self.policy.route_shape.num_layers > 0

    def measure_routes(self, mini_batches: list[StepBatch], batch: int) -> Tensor | None:
        """What the batch's routers chose and how its updates changed that, by a further pass over the same tokens."""
        if not self.measures_routes(batch):
            return None
        return gather_routes(mini_batches, self.policy, self.job.groups)

    def loss(self, batch: StepBatch) -> LossFunction:
        """The algorithm's loss on one micro-batch, with what is observed of it."""
        return observed_loss(
            self.algorithm,
            self.mismatch,
            num_sequences=batch.num_global_sequences,
            num_tokens=batch.num_global_tokens,
            cp_group=self.job.groups.sequence_group,
        )

    def sync(self) -> SyncReport:
        """Hand the policy's weights to the engines as a new version."""
        self.version += 1
        return self.resync()

    def resync(self) -> SyncReport:
        """Hand the present version's weights over again, to engines that were lost."""
        return sync_weights(self.policy, self.job, self.version)

    def state(self, recorder: Recorder, batch: int, counts: dict[str, int]) -> TrainerState:
        """What a checkpoint after `batch` holds besides the policy's tensors, whose counts are given."""
        metrics_bytes, samples_bytes = recorder.positions()
        return TrainerState(
            batch,
            self.version,
            self.next_prompt,
            metrics_bytes,
            samples_bytes,
            engine_logprobs=int(self.old_logprobs.is_open),
            **counts,
        )

    def resume(self, state: TrainerState | None) -> int | None:
        """Go on from a checkpoint's state; returns the rollout batches that are done, None of a new run."""
        if state is None:
            return None
        self.version, self.next_prompt = state.policy_version - 1, state.next_prompt  # `sync` hands over the next one
        self.old_logprobs.is_open = bool(state.engine_logprobs)
        return state.batch

    def save(self) -> None:
        """The weights as a Hugging Face folder."""
        if self.job.groups.rank == 0:
            run_folder.make_way_for_final(self.config.run.folder, self.config.train.rollout_batches)
        self.policy.save_hf(Path(self.config.run.folder) / run_folder.FINAL)

    def recorded(self, batch: int) -> AbstractContextManager[None]:
        """Has torch's profiler record the rollout batch, if it is the one that is asked for."""
        is_on = batch == self.config.log.profile_batch
        return profiled(self.config.run.folder, f"batch_{batch}", self.job.groups.rank, is_on=is_on)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the seconds of a phase under the metric's name."""
        start = time.perf_counter()
        yield
        self.times[name] = time.perf_counter() - start


def run(config: TrainConfig, signals: StopSignals | None = None) -> int:
    """The `train` command on one rank; returns its exit code."""
    with open_job(config) as job:
        return Trainer(config, job).run(signals)
