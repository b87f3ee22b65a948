"""Where a run lives, and what is kept, shown and watched of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.config.checks import require, require_positive


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    folder: str
    """Run folder; made if missing. It holds config.toml, metrics.jsonl, samples.jsonl, the report and weights."""
    seed: int = 0
    """Seed of weights, prompts and sampling."""
    overwrite: bool = False
    """Allow a run folder that already holds a run; its files are replaced."""
    resume: bool = False
    """Go on from the newest good checkpoint in the run folder; start anew if it has none. The same command can so be
    given again after any end of the run. Only for `train`."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"run.seed={self.seed} must lie between 0 and 2147483647")
        require(
            not (self.resume and self.overwrite),
            "run.resume=true keeps the run in the folder, run.overwrite=true removes it; set one of them",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 0
    """Evaluate after every this many rollout batches (train) or steps (sft); 0: only before and after."""
    prompts: int = 256
    """Held-out prompts."""
    samples: int = 1
    """Responses per held-out prompt; avg@k and pass@k are reported for k up to it."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""

    def __post_init__(self) -> None:
        require_positive("eval", self, "prompts", "samples", "temperature")
        require(self.every >= 0, f"eval.every={self.every} must be at least 0")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    samples_per_batch: int = 4
    """Rollouts written to samples.jsonl per rollout batch of train."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    profile_batch: int = 0
    """The rollout batch of train that torch's profiler records, on every rank, into the run folder's `profile`;
    0: none."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off. WANDB_MODE=offline works."""

    def __post_init__(self) -> None:
        for name in ("samples_per_batch", "profile_batch"):
            require(getattr(self, name) >= 0, f"log.{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class TelemetryConfig:
    """What is measured of a training run beyond what each rollout batch gives anyway."""

    every: int = 20
    """Measure what costs extra in every this many rollout batches, from the first: experts' gradient norms, load and
    entropy, and by a further forward pass how the updates changed the experts of the batch's tokens; 0: never."""

    def __post_init__(self) -> None:
        require(
            self.every >= 0, f"telemetry.every={self.every} must be at least 0; 0 measures nothing that costs extra"
        )

    def is_due(self, batch: int) -> bool:
        """Whether rollout batch `batch`, counted from 1, is measured."""
        return self.every > 0 and (batch - 1) % self.every == 0


@dataclass(frozen=True)
class WatchdogConfig:
    """What happens where the metrics of a training run show that something is wrong."""

    action: Literal["warn", "skip", "stop"] = "warn"
    """warn: say what it is when it begins. skip: also leave out the optimizer steps of mini-batches whose gradient norm
    is a spike or not finite, of which the latter otherwise ends the run. stop: also save a checkpoint and end the run,
    with exit code 1."""
    patience: int = 5
    """Rollout batches in a row before a reward under half of its best, or a clip that never acts, is reported."""
    entropy_floor: float = 1e-3
    """Entropy, in nats, under which nothing is explored any more."""
    spike: float = 10.0
    """A gradient norm of more than this many times its median over the rollout batches before, from the sixth on, is a
    spike."""

    def __post_init__(self) -> None:
        require_positive("watchdog", self, "patience")
        require(self.spike > 1, f"watchdog.spike={self.spike} must be above 1: it is a multiple of the median norm")
        require(self.entropy_floor >= 0, f"watchdog.entropy_floor={self.entropy_floor} must be at least 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """Training checkpoints, in the run folder's `checkpoints`; what SIGTERM, SIGUSR1 and the deadline save."""

    every: int = 0
    """Save after every this many rollout batches, and after the last one; 0: only on a signal or at the deadline."""
    keep_last: int = 2
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: int = 0
    """Also keep those of every this many rollout batches; 0: none."""
    async_save: bool = True
    """Write while training goes on. One checkpoint at most is being written; the next waits for it."""
    deadline_s: float = 0.0
    """Save and stop, with exit code 75, at the first rollout batch that ends so many seconds after the ranks' processes
    have started; 0: never."""
    load: Literal["all", "weights"] = "all"
    """What run.resume takes from the checkpoint: all; or the weights alone, with new optimizer state, for layouts and
    settings that the optimizer's state does not fit."""

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, "keep_last")
        for name in ("every", "keep_every", "deadline_s"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)} must be at least 0")
