"""The settings of each command that trains or measures: sections, and what they demand of each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from gspo_megatron.config.checks import require, require_positive
from gspo_megatron.config.learning import AlgorithmConfig, DataConfig, OptimizerConfig, SftLoopConfig, TrainLoopConfig
from gspo_megatron.config.policy import KernelsConfig, MemoryConfig, ModelConfig, ParallelConfig
from gspo_megatron.config.rollout import GenerationConfig, RolloutConfig, SGLangConfig, TaskConfig
from gspo_megatron.config.run import CheckpointConfig, EvalConfig, LogConfig, RunConfig, TelemetryConfig, WatchdogConfig


@dataclass(frozen=True)
class TrainConfig:
    """Reinforcement learning."""

    run: RunConfig
    model: ModelConfig
    task: TaskConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(
            self.algorithm.old_logprobs == "recompute" or self.model.routing_replay != "r2",
            f'algorithm.old_logprobs="{self.algorithm.old_logprobs}" leaves out the pass whose experts '
            'model.routing_replay="r2" takes; use old_logprobs="recompute", or routing_replay="r3"',
        )
        if self.returns_routes and self.rollout.engine == "sglang":
            # Here, so that `serve` starts them with it too.
            object.__setattr__(self, "sglang", replace(self.sglang, routed_experts=True))

    @property
    def returns_routes(self) -> bool:
        """Whether rollouts carry the experts of their tokens."""
        return self.rollout.routed_experts or self.model.routing_replay == "r3"


@dataclass(frozen=True)
class SftConfig:
    """Supervised cold start."""

    run: RunConfig
    model: ModelConfig
    task: TaskConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: GenerationConfig = field(default_factory=GenerationConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    sft: SftLoopConfig = field(default_factory=SftLoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class MeasureSettings:
    """What `measure` measures of a policy; it does not train for the task's sake."""

    what: Literal["lengths", "flips", "precision"] = "lengths"
    """lengths: how ratios spread with the response's length, after an update and under rounded weights; flips: what
    experts chosen at random do to ratios, at fixed weights; precision: what inexact old log-probabilities do to the
    clip."""
    prompts: int = 128
    """Held-out prompts, each with one response."""
    response_tokens: int = 512
    """Length of each of these responses: no stop token ends them."""
    skip_tokens: int = 0
    """lengths: tokens sampled before these and left out. A model trained on short answers is another one inside them
    than behind them, and a change of noise along the response would pass for an effect of length."""
    updates: int = 1
    """lengths: rollout batches of training between before and after."""

    def __post_init__(self) -> None:
        require_positive("measure", self, "updates")
        require(self.skip_tokens >= 0, f"measure.skip_tokens={self.skip_tokens} must be at least 0")
        require(self.prompts >= 2, f"measure.prompts={self.prompts} must be at least 2: spreads are over responses")
        require(
            self.response_tokens >= 16,
            f"measure.response_tokens={self.response_tokens} must be at least 16: slopes need two lengths from 8 on",
        )


@dataclass(frozen=True)
class MeasureConfig(TrainConfig):
    """Measurements of a policy: a training run's config, and what is measured."""

    measure: MeasureSettings = field(default_factory=MeasureSettings)
